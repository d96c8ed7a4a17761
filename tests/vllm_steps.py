"""A layer of vLLM's engine on the CPU whose steps are compared with float64 attention over what the pages stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import vllm_models as models
import vllm_standin
from support import attention_oracle, relative_error, through_codec

SCALE = 128**-0.5
BLOCKS, WIDTH = 80, 20


class Engine:
    """One layer, its builder, a cache, and the history of three sequences."""

    def __init__(self, cache_dtype: str = "turboquant", **options: Any) -> None:
        from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

        self.config = vllm_standin.config_of(models.DENSE, cache_dtype, **options)
        vllm_standin.build(self.config)
        specs = get_kv_cache_spec(self.config)
        names = list(specs)
        self.layer = self.config.compilation_config.static_forward_context[names[0]]
        self.impl, spec = self.layer.impl, specs[names[0]]
        self.impl.process_weights_after_loading(torch.bfloat16)
        builder = self.layer.get_attn_backend().get_builder_cls()
        self.builder = builder(spec, names, self.config, torch.device("cpu"))
        self.page = spec.block_size
        self.cache = torch.full((BLOCKS, 2, self.page, spec.state_content_size_bytes), 0xFF, dtype=torch.uint8)
        for name in names:
            self.config.compilation_config.static_forward_context[name].kv_cache = self.cache
        self.table = torch.randperm(BLOCKS)[: 3 * WIDTH].view(3, WIDTH).int()
        self.k, self.v = ([torch.zeros(0, 2, 128) for _ in range(3)] for _ in range(2))

    def step(self, work: Sequence[tuple[int, int]], padding: int = 0) -> list[float]:
        """Runs (sequence, new tokens) pairs, decoding ones first, and pads as for a CUDA graph; returns relative errors."""
        counts = [count for _, count in work]
        total = sum(counts)
        q, k, v = (torch.randn(total + padding, heads, 128).bfloat16() for heads in (4, 2, 2))
        slots = torch.cat([self._slots(sequence, count) for sequence, count in work] + [torch.full((padding,), -1)])
        metadata = self.builder.build(0, self._common(work, slots, padding))
        before = [len(self.k[sequence]) for sequence, _ in work]
        self.impl.do_kv_cache_update(self.layer, k, v, self.cache, slots)
        out = torch.full_like(q, torch.nan)
        self.impl.forward(self.layer, q, k, v, self.cache, metadata, out)
        errors, row, self.recent = [], 0, self._recent(metadata, len(work))
        for (sequence, count), length, recent in zip(work, before, self.recent, strict=True):
            rows = slice(row, row + count)
            self.k[sequence] = torch.cat((self.k[sequence], k[rows].float()))
            self.v[sequence] = torch.cat((self.v[sequence], v[rows].float()))
            decoded = count if metadata.prompts is None else min(count, max(0, metadata.prompts.first - row))
            errors.append(relative_error(out[rows], self._wanted(q[rows], sequence, length, decoded, recent)))
            row += count
        return errors

    @staticmethod
    def _recent(metadata: Any, rows: int) -> list[int]:
        """How many of each row's newest tokens are read from its ring."""
        given = [] if metadata.decode is None or metadata.decode.counts is None else metadata.decode.counts.tolist()
        return (given + [0] * rows)[:rows]

    def _slots(self, sequence: int, count: int) -> Tensor:
        positions = torch.arange(len(self.k[sequence]), len(self.k[sequence]) + count)
        return self.table[sequence].long()[positions // self.page] * self.page + positions % self.page

    def _common(self, work: Sequence[tuple[int, int]], slots: Tensor, padding: int) -> Any:
        from vllm.v1.attention.backend import CommonAttentionMetadata

        counts = [count for _, count in work]
        longest = max(counts)
        extra = padding // longest  # padding requests have no tokens and no length
        order = [sequence for sequence, _ in work]
        starts = torch.tensor([0, *counts, *[0] * extra]).cumsum(0).int()
        lens = torch.tensor([len(self.k[s]) + n for s, n in work] + [0] * extra, dtype=torch.int32)
        table = torch.cat((self.table[order], torch.zeros(extra, WIDTH, dtype=torch.int32)))
        return CommonAttentionMetadata(
            query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=lens, num_reqs=len(lens),
            num_actual_tokens=sum(counts) + padding, max_query_len=longest, max_seq_len=int(lens.max()),
            block_table_tensor=table, slot_mapping=slots, seq_lens_cpu_upper_bound=lens,
        )  # fmt: skip

    def _wanted(self, q: Tensor, sequence: int, before: int, decoded: int, recent: int) -> Tensor:
        """Attention of rows after `before` tokens, of which so many were decoded: they see themselves packed, but for what is read
        from a ring.
        """
        stop = before + len(q)
        return self._attention(q, sequence, 0, before, stop, stop - recent if decoded else before)

    def _attention(self, q: Tensor, sequence: int, start: int, before: int, stop: int, raw: int) -> Tensor:
        """Attention over tokens start..stop, those from `raw` on as they came; from `before` on they are the rows' own."""
        sides = []
        for side, x in (("k", self.k[sequence]), ("v", self.v[sequence])):
            packed = through_codec(x, self.impl.fmt, side, self.impl._channels)  # type: ignore[arg-type]
            sides.append(torch.cat((packed[:raw], x[raw:].double()))[start:stop])
        options = {"soft_cap": self.impl.soft_cap, "sinks": self.impl._sinks}
        return attention_oracle(q, *sides, scale=SCALE, first=before - start, **options)[0]  # type: ignore[arg-type]


class LocalEngine(Engine):
    """The same with attention in local chunks, as Llama 4 has it: a token sees nothing before its chunk."""

    CHUNK = 64

    def __init__(self, **options: Any) -> None:
        from vllm.model_executor.layers.attention.chunked_local_attention import create_chunked_local_attention_backend
        from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec

        super().__init__(**options)
        spec = self.builder.kv_cache_spec
        same = {name: getattr(spec, name) for name in ("block_size", "num_kv_heads", "head_size", "dtype")}
        local = ChunkedLocalAttentionSpec(
            **same, kv_quant_mode=spec.kv_quant_mode, state_content_bytes=spec.state_content_bytes,
            attention_chunk_size=self.CHUNK,
        )  # fmt: skip
        backend = create_chunked_local_attention_backend(self.layer.get_attn_backend(), self.CHUNK)
        self.builder = backend.get_builder_cls()(local, self.builder.layer_names, self.config, torch.device("cpu"))

    def _wanted(self, q: Tensor, sequence: int, before: int, decoded: int, recent: int) -> Tensor:
        assert not recent
        parts, position, last = [], before, before + len(q)
        while position < last:
            stop = min(last, (position // self.CHUNK + 1) * self.CHUNK)
            rows, start = q[position - before : stop - before], position // self.CHUNK * self.CHUNK
            raw = position if position - before >= decoded else stop
            parts.append(self._attention(rows, sequence, start, position, stop, raw))
            position = stop
        return torch.cat(parts)
