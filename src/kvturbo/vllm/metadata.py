"""What all layers of a group share in one step: which rows are decoded, which are prompts, and the plan of splits."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    max_decode_query_len,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from kvturbo.config import PAGE_SIZES
from kvturbo.ops.checks import MAX_Q_LEN
from kvturbo.ops.warmup import warmup
from kvturbo.vllm import rings
from kvturbo.vllm.pieces import PrefixPiece, pieces_of
from kvturbo.vllm.report import report
from kvturbo.vllm.schedules import Schedules


@dataclass(frozen=True)
class DecodeRows:
    """The first rows of a batch: sequences with few new tokens, which attend over pages only.

    Attributes:
        tokens: rows of q.
        block_table: [B, any] int32.
        seq_lens: [B] int32.
        q_lens: [B] int32, or None for one row each.
        schedule: the plan of splits, or None where the backend has none.
        slots, counts: [B] int32, each sequence's ring and how many of its newest tokens are read from there; None without rings.
    """

    tokens: int
    block_table: Tensor
    seq_lens: Tensor
    q_lens: Tensor | None
    schedule: Any
    slots: Tensor | None = None
    counts: Tensor | None = None


@dataclass(frozen=True)
class PromptRows:
    """The other rows: chunks of prompts, which attend to their own raw keys and values and to what was packed before.

    Attributes:
        first, last: rows of the batch.
        longest: tokens of the longest chunk.
        starts: [chunks + 1] int32, where the chunks begin, from `first` on.
        pieces: the packed prefixes.
    """

    first: int
    last: int
    longest: int
    starts: Tensor
    pieces: list[PrefixPiece]


@dataclass
class PackedMetadata:
    """One step: the rows that are decoded, and the prompts; either may be None. Wrappers of the builder in vLLM set more on it."""

    decode: DecodeRows | None
    prompts: PromptRows | None


class PackedMetadataBuilder(AttentionMetadataBuilder[PackedMetadata]):
    """Builds `PackedMetadata` from lengths that the host knows; the device's lengths are read on the device only.

    What a full CUDA graph reads (lengths, block table, plan, rings) lies in tensors that live as long as the engine; `build`
    refreshes the plan and who has which ring before every replay.

    Raises:
        ValueError: the engine would pad pages until nothing is saved, or there are more speculative tokens than the decode kernel
            takes, where the host does not know the lengths exactly.
    """

    supports_draft_decode_metadata_update = True
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        _check_padding(kv_cache_spec)
        _check_page(kv_cache_spec)
        self.reorder_batch_threshold: int | None
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        drafting = vllm_config.speculative_config is not None
        if (self.reorder_batch_threshold or 1) + _catch_up_tokens(vllm_config) > MAX_Q_LEN:
            _check_long_drafts(vllm_config)
        if (self.reorder_batch_threshold or 1) > MAX_Q_LEN:
            self.reorder_batch_threshold, drafting = 1, False
        # A draft model's catching up has more tokens than a verification, and the host knows such lengths from above only.
        self.max_q_len = MAX_Q_LEN if drafting else 1
        layers = vllm_config.compilation_config.static_forward_context
        self.layers = [layers[name] for name in layer_names]
        first = self.layers[0].impl
        # Tokens of every sequence that are in its chunk, but not in the length that the host knows.
        self._unknown = _catch_up_tokens(vllm_config) if getattr(self.layers[0], "is_draft_layer", False) else 0
        for layer in self.layers:
            layer.impl.prepare(layer, vllm_config, device)
        most = vllm_config.scheduler_config.max_num_seqs
        local = getattr(kv_cache_spec, "attention_chunk_size", None)
        if local:  # a chunk may end within a sequence's new tokens
            most *= 2
        self._prepare_rings(bool(local), most, vllm_config)
        dtype = vllm_config.model_config.dtype
        warmup(
            first.fmt, num_q_heads=first.num_heads, num_kv_heads=first.num_kv_heads, page_size=kv_cache_spec.block_size,
            dtype=dtype, device=device, max_q_len=self.max_q_len, backend=first.backend,
            soft_cap=first.soft_cap, sinks=first.has_sinks, ring_size=self._ring_plan.size,
        )  # fmt: skip
        self._q_lens = torch.zeros(most, dtype=torch.int32, device=device)
        self._schedules = None
        if first.backend == "cuda":
            self._schedules = Schedules(
                first.fmt, kv_cache_spec.block_size, first.num_heads, first.num_kv_heads, dtype, most,
                self.max_q_len, device, self._ring_plan.size,
            )  # fmt: skip
        report(vllm_config)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Uniform batches; of one token each where drafts are longer than the decode kernel takes."""
        if max_decode_query_len(vllm_config) > MAX_Q_LEN:
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return cls._cudagraph_support

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> PackedMetadata:
        """The metadata of a step; gives out rings and refreshes the plan of splits on the current stream, without a
        synchronisation.

        Raises:
            NotImplementedError: new tokens are to see those after them.
        """
        if common_attn_metadata.causal is not True:
            raise NotImplementedError(
                f"kvturbo: attention that is not causal is not supported (causal={common_attn_metadata.causal}); use "
                "--kv-cache-dtype auto"
            )
        if self._rings is not None:
            self._rings.update(common_attn_metadata, len(self.layers[0].kv_cache))
        decodes, prompts, decode_tokens, _ = split_decodes_and_prefills(
            common_attn_metadata, decode_threshold=self.max_q_len
        )
        return PackedMetadata(
            self._decode_rows(common_attn_metadata, decodes, decode_tokens) if decode_tokens else None,
            self._prompt_rows(common_attn_metadata, decodes, decode_tokens) if prompts else None,
        )

    def update_draft_decode_metadata(self, metadata: PackedMetadata) -> None:
        """Makes the plan again for lengths that have grown on the device; can be captured. Only drafting layers need it, which have
        no rings.
        """
        rows = metadata.decode
        assert rows is None or rows.counts is None, "rings are given out once per step"
        if rows is not None and rows.schedule is not None:
            rows.schedule.update(rows.seq_lens, rows.q_lens)

    def _decode_rows(self, common: CommonAttentionMetadata, batch: int, tokens: int) -> DecodeRows:
        seq_lens, q_lens = common.seq_lens[:batch], None
        if tokens != batch:
            q_lens = self._q_lens[:batch]
            torch.sub(common.query_start_loc[1 : batch + 1], common.query_start_loc[:batch], out=q_lens)
        schedule = slots = counts = None
        if self._rings is not None:
            slots, counts = self._rings.slots[:batch], self._rings.counts[:batch]
        if self._schedules is not None:
            schedule = self._schedules.of(batch, tokens)
            schedule.update(seq_lens, q_lens, recent_counts=counts)
        return DecodeRows(tokens, common.block_table_tensor[:batch], seq_lens, q_lens, schedule, slots, counts)

    def _prompt_rows(self, common: CommonAttentionMetadata, decodes: int, first: int) -> PromptRows:
        starts = common.query_start_loc_cpu[decodes : common.num_reqs + 1].tolist()
        lengths = common.seq_lens_cpu_upper_bound[decodes : common.num_reqs].tolist()  # exact for prompts
        counts = [end - start for start, end in pairwise(starts)]
        prefixes = [max(0, length + self._unknown - count) for count, length in zip(counts, lengths, strict=True)]
        pieces = pieces_of(
            [start - first for start in starts], prefixes, common.block_table_tensor[decodes : common.num_reqs],
            self.kv_cache_spec.block_size, self.layers[0].impl.piece_tokens,
        )  # fmt: skip
        bounds = common.query_start_loc[decodes : common.num_reqs + 1] - first
        return PromptRows(first, starts[-1], max(counts), bounds, pieces)

    def _prepare_rings(self, local: bool, most: int, vllm_config: Any) -> None:
        """Layers have them from now on, since graphs may be captured before there is a step."""
        plans = {layer.impl.ring_plan(layer) for layer in self.layers}
        self._ring_plan = rings.Plan() if local or len(plans) > 1 else plans.pop()
        self._rings: rings.Rings | None = None
        if self._ring_plan.count:
            captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
            tokens = max(vllm_config.scheduler_config.max_num_batched_tokens, captured)
            self._rings = rings.Rings(
                self._ring_plan, self.kv_cache_spec.block_size, most, tokens, self.device, rings.kernel_on(self.device)
            )
        for layer in self.layers:
            layer.impl.use_rings(self._rings)


def _check_padding(spec: Any) -> None:
    """The engine pads packed pages to those of 16-bit layers in their pool, where these are no multiple of a packed page."""
    padded = spec.page_size_padded
    if padded is not None and padded > 1.25 * spec.unpadded_page_size_bytes:
        raise ValueError(
            f"kvturbo: blocks of {spec.unpadded_page_size_bytes} bytes would be padded to {padded}, those of 16-bit layers; leave "
            "--kv-cache-dtype-skip-layers out (sliding-window layers are kept in 16 bits without it), or use --kv-cache-dtype auto"
        )


def _check_page(spec: Any) -> None:
    """The engine splits blocks into pages, except where a block holds all layers, as KV connectors may want it."""
    if spec.block_size not in PAGE_SIZES:
        raise ValueError(
            f"kvturbo: blocks of {spec.block_size} tokens can't be split into pages here; pass --block-size "
            f"{' or '.join(map(str, PAGE_SIZES))}"
        )


def _catch_up_tokens(vllm_config: Any) -> int:
    """Tokens that a draft model of its own reads beside those that were verified: the one that was sampled."""
    draft = vllm_config.speculative_config
    return int(draft is not None and draft.method == "draft_model" and vllm_config.use_v2_model_runner)


def _check_long_drafts(vllm_config: Any) -> None:
    """With asynchronous scheduling the host knows an upper bound of a drafting sequence's length only."""
    if vllm_config.scheduler_config.async_scheduling:
        tokens, most = max_decode_query_len(vllm_config) - 1, MAX_Q_LEN - 1 - _catch_up_tokens(vllm_config)
        raise ValueError(
            f"kvturbo: num_speculative_tokens must be at most {most} with asynchronous scheduling, got {tokens}; "
            "lower it or pass --no-async-scheduling"
        )
