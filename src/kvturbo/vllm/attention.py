"""A layer's attention: stores new keys and values in pages, decodes over pages, and lets prompts attend to both."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl

from kvturbo import ops
from kvturbo.layout import PageLayout
from kvturbo.ops.recent import Recent
from kvturbo.vllm import engine, rings
from kvturbo.vllm.channels import outlier_channels
from kvturbo.vllm.formats import format_of
from kvturbo.vllm.metadata import PackedMetadata
from kvturbo.vllm.prefill import Prompts, Shapes


class PackedAttention(AttentionImpl[PackedMetadata]):
    """vLLM's AttentionImpl over packed pages.

    Attributes:
        backend: of store, decode and gather; an explicit choice, which raises with the reason where it can't run.
        fmt: the format.

    Raises:
        NotImplementedError: the layer asks for something that packed pages can't do; the message says what to use.
        ValueError: the format does not exist for the head size, or the size of rings that the user gives does not.
    """

    backend: ClassVar[str] = "cuda"
    supports_quant_query_input = False
    can_return_lse_for_decode = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **others: Any,
    ) -> None:
        _refuse(
            {
                "ALiBi": alibi_slopes is not None,
                "a sliding window": sliding_window is not None,
                f"{attn_type} attention": attn_type != "decoder",
                f"sharing the cache of {kv_sharing_target_layer_name}": kv_sharing_target_layer_name is not None,
                **{name: not _unset(value) for name, value in others.items()},
            }
        )
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_size, self.scale, self.kv_cache_dtype = head_size, scale, kv_cache_dtype
        self.fmt = format_of(kv_cache_dtype, head_size)
        self.soft_cap = logits_soft_cap or None
        self.has_sinks, self._sink_weights = sinks is not None, sinks
        self._sinks: Tensor | None = None
        self._channels: Tensor | None = None
        config = get_current_vllm_config()
        self._shapes = Shapes(num_heads, self.num_kv_heads, head_size, config.model_config.dtype)
        self._flash = engine.flash_attention(head_size, scale, self.soft_cap)
        self._prompts: Prompts | None = None
        self._ring_plan = rings.plan_of(config, self.backend)
        self._ring_rows: Tensor | None = None
        self._rings: rings.Rings | None = None

    @property
    def workspace_bytes(self) -> int:
        """Bytes of the memory that prompts need, which all layers share."""
        return self._shapes.nbytes()

    @property
    def piece_tokens(self) -> int:
        """Tokens of a packed prefix that prompts attend to at once."""
        return self._shapes.piece_tokens

    def ring_plan(self, layer: Any) -> rings.Plan:
        """The rings of the layer, an attention layer of vLLM, whose implementation this is."""
        return rings.of_layer(layer, self._ring_plan)

    def ring_bytes(self, layer: Any) -> int:
        """Bytes of the layer's rings."""
        return math.prod(self._ring_shape(layer)) * self._shapes.dtype.itemsize

    def use_rings(self, given: rings.Rings | None) -> None:
        """From now on steps store into rings, and decode reads from them, as `given` says; not at all if it is None."""
        self._rings = given

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Sinks are weights: they are there now, and the kernels want them in fp32. Weights that are loaded again go into the same
        tensor, whose address captured graphs hold.
        """
        if self._sink_weights is None:
            return
        if self._sinks is None:
            self._sinks = torch.empty_like(
                self._sink_weights, dtype=torch.float32, memory_format=torch.contiguous_format
            )
        self._sinks.copy_(self._sink_weights.detach())

    def prepare(self, layer: Any, vllm_config: Any, device: torch.device) -> None:
        """Called once the cache is set up and before any step: outlier channels, memory for prompts, and rings."""
        if self.fmt.outliers and self._channels is None:
            self._channels = outlier_channels(layer, self.fmt, self.num_kv_heads, vllm_config).to(device)
        self._prompts_on(device).warm_up(self._shapes.dtype, device)
        self._take_rings(layer, device)

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Packs new keys and values into their slots, and copies the newest of each sequence into its ring; slot -1 skips.
        Arguments as vLLM's.
        """
        count = len(slot_mapping)
        if count:
            rows, slots = (None, None) if self._rings is None else (self._ring_rows, self._rings.token_slots[:count])
            ops.store(
                key[:count], value[:count], self._pages(kv_cache), slot_mapping, fmt=self.fmt,
                outlier_channels=self._channels, recent_rows=rows, recent_slots=slots, backend=self.backend,
            )  # fmt: skip

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: PackedMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of the step's rows: query [T, Hq, d], key and value [T, Hkv, d], output [T, Hq, d].

        Without metadata (vLLM measures the memory it needs) it takes its workspace and its rings and returns 0.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("kvturbo: quantised attention outputs are not supported; turn the fusion off")
        if attn_metadata is None:
            self._prompts_on(query.device).workspace()
            self._take_rings(layer, query.device)
            return output.fill_(0)
        pages = self._pages(kv_cache)
        if attn_metadata.decode is not None:
            self._decode(query, pages, attn_metadata, output)
        rows = attn_metadata.prompts
        if rows is not None:
            q, k, v, out = (x[rows.first : rows.last] for x in (query, key, value, output))
            lse = self._prompts_on(query.device).attend(q, k, v, pages, rows, self._channels, out)
            if self._sinks is not None:  # a logit without a value: it takes its share of the weight
                share = torch.sigmoid(lse - self._sinks[:, None])
                out.mul_(share.T[:, :, None])  # in place: no copy in fp32
        return output

    def _decode(self, query: Tensor, pages: Tensor, metadata: PackedMetadata, output: Tensor) -> None:
        rows, recent = metadata.decode, None
        assert rows is not None
        if self._ring_rows is not None and rows.slots is not None and rows.counts is not None:
            recent = Recent(self._ring_rows, rows.slots, rows.counts)
        ops.decode(
            query[: rows.tokens], pages, rows.block_table, rows.seq_lens, fmt=self.fmt, scale=self.scale,
            q_lens=rows.q_lens, soft_cap=self.soft_cap, sinks=self._sinks, outlier_channels=self._channels,
            recent=recent, schedule=rows.schedule, out=output[: rows.tokens], backend=self.backend,
        )  # fmt: skip

    def _ring_shape(self, layer: Any) -> tuple[int, ...]:
        plan = self.ring_plan(layer)
        return plan.count, self.num_kv_heads, 2, plan.size, self.head_size

    def _take_rings(self, layer: Any, device: torch.device) -> None:
        if self._ring_rows is None and self.ring_plan(layer).count:
            self._ring_rows = torch.zeros(self._ring_shape(layer), dtype=self._shapes.dtype, device=device)

    def _pages(self, kv_cache: Tensor) -> Tensor:
        """vLLM's view [blocks, heads, tokens, bytes per token] as pages [blocks, heads, page_bytes].

        Raises:
            ValueError: a head's tokens are not one run of bytes, or pages are not aligned to 16 bytes.
        """
        blocks, heads, tokens, size = kv_cache.shape
        page = PageLayout.of(self.fmt, tokens).page_bytes
        block, head, token, byte = kv_cache.stride()
        runs = byte == 1 and token == size and (heads == 1 or head == page)
        if tokens * size != page or not runs or block % 16 or block < heads * page:
            raise ValueError(
                f"kvturbo: blocks must hold {heads} pages of {page} bytes after one another, 16-byte aligned; "
                f"got shape {list(kv_cache.shape)}, strides {kv_cache.stride()}"
            )
        return kv_cache.as_strided((blocks, heads, page), (block, page, 1))

    def _prompts_on(self, device: torch.device) -> Prompts:
        if self._prompts is None:
            self._prompts = Prompts(
                self.fmt, self.scale, self._flash, engine.merge, engine.workspace(self._shapes, device), self.backend
            )
        return self._prompts


def _refuse(wishes: dict[str, bool]) -> None:
    for name, wished in wishes.items():
        if wished:
            raise NotImplementedError(
                f"kvturbo: {name} is not supported on packed pages; use --kv-cache-dtype auto or fp8, or name the layers in "
                "--kv-cache-dtype-skip-layers"
            )


def _unset(value: Any) -> bool:
    """Whether a model left an option at what it means without it."""
    return value is None or value is False or (isinstance(value, int) and value == -1)
