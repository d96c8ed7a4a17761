"""The cache of machine code: hits, damage, two processes at once, privacy, sources that do not compile. No GPU needed."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("cuda.core", reason="needs the extra 'cuda'")

from kvturbo.cuda import jit

SOURCE = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= FACTOR; }'
TWO_PROCESSES = """
import sys
from kvturbo.cuda import jit
print("ready", flush=True)
sys.stdin.readline()
print(jit.compiled(sys.argv[1], "sm_90a", {"FACTOR": 2}).hex())
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kvturbo"


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The architectures that were compiled for, in order."""
    calls: list[str] = []
    real = jit.compile_source

    def counted(source: str, arch: str, macros: dict[str, int | str]) -> tuple[bytes, str]:
        calls.append(arch)
        return real(source, arch, macros)

    monkeypatch.setattr(jit, "compile_source", counted)
    return calls


def test_a_hit_gives_the_same_bytes_and_compiles_nothing(folder: Path, compilations: list[str]) -> None:
    first = jit.compiled(SOURCE, "sm_90a", {"FACTOR": 2})
    assert jit.compiled(SOURCE, "sm_90a", {"FACTOR": 2}) == first
    assert compilations == ["sm_90a"]
    assert first[:4] == b"\x7fELF"
    assert len(list(folder.iterdir())) == 1, "no temporary file is left"


def test_source_macros_and_architecture_are_part_of_the_key(compilations: list[str]) -> None:
    codes = {
        jit.compiled(SOURCE, "sm_90a", {"FACTOR": 2}),
        jit.compiled(SOURCE, "sm_90a", {"FACTOR": 3}),
        jit.compiled(SOURCE, "sm_80", {"FACTOR": 2}),
        jit.compiled(SOURCE.replace("twice", "thrice"), "sm_90a", {"FACTOR": 2}),
    }
    assert len(codes) == 4
    assert compilations == ["sm_90a", "sm_90a", "sm_80", "sm_90a"]


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_a_damaged_file_is_compiled_again_and_replaced(folder: Path, compilations: list[str], damage: str) -> None:
    code = jit.compiled(SOURCE, "sm_90a", {"FACTOR": 2})
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes({"flipped": bytes(flipped), "truncated": whole[:-5], "empty": b""}[damage])
    assert jit.compiled(SOURCE, "sm_90a", {"FACTOR": 2}) == code
    assert len(compilations) == 2
    assert path.read_bytes() == whole


def test_two_processes_that_compile_at_once_get_the_same_code(folder: Path) -> None:
    command = [sys.executable, "-c", TWO_PROCESSES, SOURCE]
    both = [subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True, env=os.environ) for _ in range(2)]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    code = jit.compiled(SOURCE, "sm_90a", {"FACTOR": 2})
    assert {out.strip() for out, _ in outputs} == {code.hex()}
    assert len(list(folder.iterdir())) == 1


HALF_MADE = "import time\n__spec__ = None  # as cuda.core does it: others take the module for whole from here on\ntime.sleep(0.5)\n"
STAND_INS = {
    "cuda": "",
    "cuda.core": f"""{HALF_MADE}
class ProgramOptions:
    def __init__(self, **options): pass
class Program:
    def __init__(self, source, language, options): self.code = source.encode()
    def compile(self, target, logs): return self
""",
    "cuda.bindings": "",
    "cuda.bindings.nvrtc": f"{HALF_MADE}def nvrtcVersion(): return 0, 13, 0",
}


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Packages that nobody has imported yet, in place of cuda-core and cuda-bindings."""
    for name in [name for name in sys.modules if name.split(".")[0] == "cuda"]:
        monkeypatch.delitem(sys.modules, name)
    for name, source in STAND_INS.items():
        path = tmp_path.joinpath("packages", *name.split("."), "__init__.py")
        path.parent.mkdir(parents=True)
        path.write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    jit._nvrtc_version.cache_clear()
    yield
    jit._nvrtc_version.cache_clear()
    for name in STAND_INS:
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("stand_ins")
def test_threads_that_are_the_first_to_compile_find_whole_packages() -> None:
    def code_of(number: int) -> bytes:
        time.sleep(0.1 * number)  # one after another, while a package is being made
        return jit.compiled(f"source {number}", "sm_90a", {})

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(code_of, range(4))) == [f"source {number}".encode() for number in range(4)]


def test_the_folder_is_private_and_so_are_the_files(folder: Path) -> None:
    before = os.umask(0)
    try:
        jit.compiled(SOURCE, "sm_90a", {"FACTOR": 2})
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


@pytest.mark.parametrize("mode,owner", [(0o777, 0), (0o720, 0), (0o700, 1)], ids=["all", "its group", "another user"])
def test_code_that_somebody_else_could_have_written_is_not_used(
    folder: Path,
    compilations: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mode: int,
    owner: int,
) -> None:
    code = jit.compiled(SOURCE, "sm_90a", {"FACTOR": 2})
    (path,) = folder.iterdir()
    folder.chmod(mode)
    user = os.getuid() + owner
    monkeypatch.setattr(os, "getuid", lambda: user)
    path.write_bytes(hashlib.sha256(b"planted").digest() + b"planted")
    with caplog.at_level(logging.WARNING):
        assert [jit.compiled(SOURCE, "sm_90a", {"FACTOR": 2}) for _ in range(2)] == [code, code]
    assert len(compilations) == 2, "this process has a folder of its own, and finds its code there"
    own = jit.cache_folder()
    assert own != folder and stat.S_IMODE(own.stat().st_mode) == 0o700 and len(list(own.iterdir())) == 1
    assert path.read_bytes().endswith(b"planted") and len(list(folder.iterdir())) == 1
    (message,) = caplog.messages
    assert f"{folder} belongs to user {user - owner} with mode {mode:o}, this process is user {user}" in message


@pytest.mark.parametrize("call", ["fdopen", "replace"])
def test_a_write_that_fails_leaves_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left on device"):
        jit.compiled(SOURCE, "sm_90a", {"FACTOR": 2})
    assert not list(folder.iterdir())


def test_a_source_that_does_not_compile_is_an_error_that_shows_the_line(folder: Path) -> None:
    with pytest.raises(Exception, match="undefined_name"):
        jit.compiled(SOURCE.replace("FACTOR", "undefined_name"), "sm_90a", {})
    assert not folder.exists() or not list(folder.iterdir())
