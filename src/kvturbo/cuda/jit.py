"""Compiles CUDA sources with NVRTC (through cuda.core), caches the machine code on disk, loads and launches kernels.

No nvcc and no headers are needed. A cached file is named by a hash of everything that went into it, is written to a temporary
file and renamed, and carries a digest that is verified when it is read; processes never wait for one another.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Callable
from functools import cached_property, lru_cache
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import Any

import torch

_DIGEST_BYTES = 32
_importing = Lock()
_log = logging.getLogger(__name__)


class CudaError(RuntimeError):
    """A CUDA driver call failed; the message names the call and the error."""


def cuda_module(name: str) -> Any:
    """A module of cuda-core or cuda-bindings, which one thread at a time imports.

    cuda.core puts another module's `__spec__` in the place of its own while it is made, so that a second thread takes it for whole.
    """
    with _importing:
        return import_module(name)


def arch_of(device: torch.device) -> str:
    """The compile target of a device, such as `sm_90a`: the architecture-specific one from Hopper on."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def cache_folder() -> Path:
    """Where machine code is cached: `kvturbo` in XDG_CACHE_HOME or ~/.cache, private to the user.

    Machine code is run as it is found, so a folder that somebody else owns or may write to is not used: the log says so, and
    this process compiles into a folder of its own, which goes when it ends.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvturbo"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = folder.stat()
    if found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return folder
    return Path(_own_folder(folder, found.st_uid, stat.S_IMODE(found.st_mode)).name)


@lru_cache(maxsize=8)
def _own_folder(refused: Path, owner: int, mode: int) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder for this process, instead of one that others can write to."""
    _log.warning(
        "%s belongs to user %d with mode %o, this process is user %d: kernels are compiled anew in every process; chown it and "
        "chmod it to 700, or set XDG_CACHE_HOME",
        refused, owner, mode, os.getuid(),
    )  # fmt: skip
    return tempfile.TemporaryDirectory(prefix="kvturbo-")


def compile_source(source: str, arch: str, macros: dict[str, int | str]) -> tuple[bytes, str]:
    """Compiles without looking into the cache.

    Args:
        source: CUDA C++.
        arch: such as `sm_90a`.
        macros: names and values.

    Returns:
        The cubin, and the assembler's report (registers, spills).

    Raises:
        cuda.core's NVRTCError: the source does not compile.
    """
    import io

    core = cuda_module("cuda.core")
    options = core.ProgramOptions(
        arch=arch,
        std="c++17",
        use_fast_math=True,
        ptxas_options="-v",
        define_macro=[(name, str(value)) for name, value in macros.items()] or None,
    )
    report = io.StringIO()
    code = core.Program(source, "c++", options).compile("cubin", logs=report).code
    return bytes(code), report.getvalue().rstrip("\0")


def compiled(source: str, arch: str, macros: dict[str, int | str]) -> bytes:
    """The cubin of a source, from the cache or compiled now and cached; arguments as for `compile_source`."""
    key = hashlib.sha256(repr((source, arch, sorted(macros.items()), _nvrtc_version())).encode()).hexdigest()
    path = cache_folder() / f"{key}.cubin"
    if path.exists():
        data = path.read_bytes()
        code = data[_DIGEST_BYTES:]
        if hashlib.sha256(code).digest() == data[:_DIGEST_BYTES]:
            return code
    code, _ = compile_source(source, arch, macros)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # there still if the disk is full
    return code


class Parameters(ctypes.Structure):
    """A kernel's struct, which knows where the driver finds it."""

    @cached_property
    def _pointer(self) -> ctypes.Array[ctypes.c_void_p]:
        return (ctypes.c_void_p * 1)(ctypes.addressof(self))

    @cached_property
    def address(self) -> int:
        """Of the list of arguments that cuLaunchKernel takes."""
        return ctypes.addressof(self._pointer)


def current_device() -> int:
    """The index of the current GPU, once CUDA is initialised; half of the time of `torch.cuda.current_device`."""
    return int(torch._C._cuda_getDevice())


def current_stream(device: int) -> int:
    """The handle of a GPU's current stream; a tenth of the time of `torch.cuda.current_stream`."""
    return int(torch._C._cuda_getCurrentRawStream(device))


empty_strided: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor]
empty_strided = torch._C._dynamo.guards._empty_strided_cuda  # type: ignore[attr-defined]
"""Memory on the current GPU (shape, strides, dtype) as torch.compile's code gets it, in two thirds of `torch.empty_like`'s time."""


class Kernel:
    """A loaded kernel that takes one struct by value.

    Args:
        code: a cubin.
        name: the kernel's name in it.
        device: where it will run.
        shared_bytes: dynamic shared memory per CTA.
    """

    def __init__(self, code: bytes, name: str, device: torch.device, shared_bytes: int = 0) -> None:
        driver = cuda_module("cuda.bindings.driver")
        self._driver, self._device, self.shared_bytes = driver, device.index, shared_bytes
        self._launch = driver.cuLaunchKernel
        with torch.cuda.device(device):  # a function belongs to the context that is current when it is asked for
            torch.cuda.current_stream(device)
            self._library = _checked(driver.cuLibraryLoadData(code, None, None, 0, None, None, 0))
            kernel = _checked(driver.cuLibraryGetKernel(self._library, name.encode()))
            self._function = _checked(driver.cuKernelGetFunction(kernel))
            limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(self._function, limit, shared_bytes))

    def ctas_per_sm(self, threads: int) -> int:
        """How many CTAs of that many threads fit on a multiprocessor at once."""
        count = self._driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self._function, threads, self.shared_bytes)
        return int(_checked(count))

    def launch(self, grid: int, threads: int, parameters: Parameters, stream: int) -> None:
        """Launches on a stream (its handle) of the kernel's device. The parameters are copied before this returns."""
        if current_device() != self._device:  # the default stream's handle means the current device's
            with torch.cuda.device(self._device):
                return self.launch(grid, threads, parameters, stream)
        error = self._launch(
            self._function, grid, 1, 1, threads, 1, 1, self.shared_bytes, stream, parameters.address, 0
        )[0]
        if error:
            raise CudaError(f"CUDA driver error {error!r}")


@lru_cache(maxsize=1)
def _nvrtc_version() -> tuple[int, int]:
    _, major, minor = cuda_module("cuda.bindings.nvrtc").nvrtcVersion()
    return major, minor


def _checked(result: tuple[Any, ...]) -> Any:
    error, *values = result
    if int(error):
        raise CudaError(f"CUDA driver error {error!r}")
    return values[0] if values else None
