"""Rings of raw tokens: every running sequence has one per layer, in which its newest tokens lie as they came, beside the pages.

Which sequence has which ring is kept on the device (rings.cu), by the blocks that its newest tokens lie in: an engine tells its
attention nothing else. All layers of a metadata builder share it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvturbo.cuda.jit import Kernel, Parameters, arch_of, compiled, current_stream
from kvturbo.ops.checks import MAX_Q_LEN
from kvturbo.ops.recent import RING_SIZES

MAX_RINGS = 256
THREADS = 1024
MACROS: dict[str, int | str] = {"MAX_RINGS": MAX_RINGS, "THREADS": THREADS, "MAX_Q_LEN": MAX_Q_LEN}
"""What rings.cu is compiled with."""
SIZES = (0, *RING_SIZES)
"""What a user may ask for."""
DEFAULT = 16
"""Tokens of a ring where the user does not say otherwise."""
IDLE = 4
"""Where more sequences may run than there are rings: steps for which a ring must not have been used before others get it. More than
the batches that a pipeline alternates, as a rule."""
BACKENDS = ("cuda",)
"""Backends that are given rings."""
SOURCE = Path(__file__).with_name("rings.cu")
_OFF = '--additional-config \'{"kvturbo": {"recent": 0}}\''


@dataclass(frozen=True)
class Plan:
    """Rings of a layer.

    Attributes:
        size: tokens of a ring.
        count: rings; 0 for none.
        idle: steps for which a ring must not have been used before it is given to another sequence.
        why: why there are none.
    """

    size: int = 0
    count: int = 0
    idle: int = 0
    why: str = ""


def plan_of(vllm_config: Any, backend: str) -> Plan:
    """The rings of a packed layer, as far as the engine's configuration says.

    Raises:
        ValueError: the size that the user gives does not exist.
    """
    size = ring_size(vllm_config.additional_config)
    why = _why_none(vllm_config, backend) if size else "recent is 0"
    running = vllm_config.scheduler_config.max_num_seqs
    return Plan(why=why) if why else Plan(size, min(running, MAX_RINGS), IDLE if running > MAX_RINGS else 0)


def ring_size(additional_config: Any) -> int:
    """Tokens of a ring, from `--additional-config '{"kvturbo": {"recent": 8}}'`; 0 for no rings.

    Raises:
        ValueError: it is none of the valid sizes, or "kvturbo" has anything else in it.
    """
    options = additional_config.get("kvturbo", {}) if isinstance(additional_config, dict) else {}
    if not isinstance(options, dict) or set(options) - {"recent"}:
        raise ValueError(f'kvturbo: "kvturbo" in --additional-config must be like {{"recent": 16}}, got {options!r}')
    size = options.get("recent", DEFAULT)
    if type(size) is not int or size not in SIZES:
        raise ValueError(
            f"kvturbo: recent in --additional-config must be one of {', '.join(map(str, SIZES))}, got {size!r}"
        )
    return size


def _why_none(vllm_config: Any, backend: str) -> str:
    """Why an engine has no rings. They need every token of a block to come from a row of a batch, and rows to be sequences."""
    parallel, cache, dtype = vllm_config.parallel_config, vllm_config.cache_config, vllm_config.model_config.dtype
    reasons = {
        f"the {backend} backend is not given any": backend not in BACKENDS,
        f"dtype {dtype} has none": dtype not in (torch.bfloat16, torch.float16),
        "a KV connector fills blocks": vllm_config.kv_transfer_config is not None,
        "blocks are copied where Mamba states are cached within blocks": cache.mamba_cache_mode == "align",
        "context parallelism": max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1,
        "batches are cut into microbatches": parallel.use_ubatching,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def of_layer(layer: Any, plan: Plan) -> Plan:
    """The rings of a layer: none for drafting layers, whose builder runs between steps, nor for attention in local chunks, whose
    rows are not sequences.
    """
    if plan.count and layer.is_draft_layer:
        return Plan(why="drafting layers have none")
    if plan.count and getattr(layer, "attention_chunk_size", None):
        return Plan(why="attention in local chunks has none")
    return plan


def line_of(plans: list[Plan], nbytes: int) -> str:
    """What the log says at the start.

    Args:
        plans: of the packed layers, at least one.
        nbytes: of all their rings on this rank.
    """
    given = [plan for plan in plans if plan.count]
    if not given:
        return f"no tokens are kept raw ({plans[0].why})"
    return (
        f"the newest {given[0].size} tokens of up to {given[0].count} sequences are also kept raw, in {nbytes / 2**20:.0f} MiB of "
        f"rings for {len(given)} layers"
    )


Launch = Callable[[Parameters], None]
"""Runs rings.cu, once per step."""


@lru_cache(maxsize=8)
def kernel_on(device: torch.device) -> Launch:
    """The kernel, compiled and loaded; it runs on the device's current stream."""
    device = torch.empty(0, device=device).device  # with its index
    kernel = Kernel(compiled(SOURCE.read_text(), arch_of(device), MACROS), "rings", device)
    return partial(_launch, kernel, device.index)


def _launch(kernel: Kernel, device: int, parameters: Parameters) -> None:
    kernel.launch(1, THREADS, parameters, current_stream(device))


class _Params(Parameters):
    """`Params` of rings.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("seq_lens", "q_starts", "block_table", "stored", "ring_of_block")),
        *(
            (name, ctypes.c_void_p)
            for name in ("owners", "next", "first", "used", "clock", "slots", "counts", "token_slots")
        ),
        *(
            (name, ctypes.c_int)
            for name in ("table_stride", "batch", "most", "tokens", "rings", "size", "idle", "block")
        ),
    )


class Rings:
    """Who has which ring. Its public tensors are there from the start and live as long as it does: captured graphs hold their
    addresses.

    Args:
        plan: size, number, and when one is given away.
        block: tokens of a block.
        most: sequences of the largest batch.
        tokens: tokens of the largest batch, padding included.
        device: where the block table is.
        launch: runs the kernel.

    Attributes:
        size: tokens of a ring.
        slots: [most] int32, each row's ring, -1 for none.
        counts: [most] int32, how many of its newest tokens, this step's included, are read from there.
        token_slots: [tokens] int64, where each token of the step is stored: ring * size + position % size, -1 for nowhere.
    """

    def __init__(self, plan: Plan, block: int, most: int, tokens: int, device: torch.device, launch: Launch) -> None:
        def ints(*shape: int, value: int = 0, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self.size, self.slots, self.counts = plan.size, ints(most, value=-1), ints(most)
        self.token_slots = ints(tokens, value=-1, dtype=torch.int64)
        self._launch, self._device, self._ring_of_block = launch, self.slots.device, ints(0)
        never = -(1 << 30)
        self._state = {
            "owners": ints(plan.count, 2, value=-1), "next": ints(plan.count),
            "first": ints(plan.count), "used": ints(plan.count, value=never), "clock": ints(2),
        }  # fmt: skip
        tensors = self._state | {"slots": self.slots, "counts": self.counts, "token_slots": self.token_slots}
        self._parameters = _Params(
            **{name: x.data_ptr() for name, x in tensors.items()},
            most=most, tokens=tokens, rings=plan.count, size=plan.size, idle=plan.idle, block=block,
        )  # fmt: skip

    def update(self, common: Any, blocks: int) -> None:
        """Gives the rows of a step their rings, on the device; before its tokens are stored.

        Args:
            common: vLLM's CommonAttentionMetadata.
            blocks: of the cache, as the block table numbers them.

        Raises:
            ValueError: the batch is larger than was said, or a tensor is not what the kernel reads.
        """
        rows, tokens = common.num_reqs, common.num_actual_tokens
        if rows > len(self.slots) or tokens > len(self.token_slots):
            raise ValueError(
                f"kvturbo: rings are made for {len(self.slots)} sequences and {len(self.token_slots)} tokens at once, got {rows} "
                f"and {tokens}; turn them off with {_OFF}"
            )
        inputs = {
            "seq_lens": (common.seq_lens, torch.int32), "q_starts": (common.query_start_loc, torch.int32),
            "block_table": (common.block_table_tensor, torch.int32), "stored": (common.slot_mapping, torch.int64),
        }  # fmt: skip
        for name, (x, dtype) in inputs.items():
            if x.dtype != dtype or x.stride(-1) != 1 or x.device != self._device:
                raise ValueError(
                    f"kvturbo: {name} must be {dtype} on {self._device} in rows without gaps, got {x.dtype} on {x.device}, strides "
                    f"{x.stride()}; turn rings off with {_OFF}"
                )
            setattr(self._parameters, name, x.data_ptr())
        if len(self._ring_of_block) != blocks:  # at the first step: builders are made before the cache
            self._ring_of_block = torch.full((blocks,), -1, dtype=torch.int32, device=self._device)
            self._parameters.ring_of_block = self._ring_of_block.data_ptr()
        self._parameters.table_stride, self._parameters.batch = common.block_table_tensor.stride(0), rows
        self._launch(self._parameters)
