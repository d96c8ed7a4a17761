"""lm-evaluation-harness on a packed cache: `kvturbo-lm-eval` is its command line with a model type `kvturbo` added.

    pip install 'kvturbo[lm-eval]'
    kvturbo-lm-eval --model kvturbo --model_args pretrained=Qwen/Qwen2.5-7B-Instruct,format=k4v4 --tasks gsm8k

Every option of `lm_eval` holds, and every option of its `hf` model. The harness has no way to find models of other packages,
so `lm_eval` itself does not know `kvturbo`.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from kvturbo.eval.caches import REFERENCE, CacheSpec, PackedReadsError, attention_for, check_name
from kvturbo.eval.model import LoadedModel
from kvturbo.eval.scoring import chunks

CHUNK = 64


@register_model("kvturbo")
class PackedCacheLM(HFLM):
    """The harness's transformers model, with its tokens read back from a packed cache.

    Log-likelihoods are computed in chunks: a chunk sees its own raw keys and values and packed ones of everything before.
    Generation prefills the prompt raw, and every token after it reads packed keys and values.

    Args:
        pretrained: a folder, a hub id or a model.
        format: a format's name, or `16bit`.
        recent, sink: 16-bit windows in tokens, by default the format's.
        chunk: tokens of a chunk; 1 is decoding.
        kwargs: as for the harness's `hf` model.

    Raises:
        ValueError: the format is unknown or does not fit the model, or chunk is not positive.
    """

    def __init__(
        self,
        pretrained: Any,
        format: str = "k4v4",
        recent: int | None = None,
        sink: int | None = None,
        chunk: int = CHUNK,
        **kwargs: Any,
    ) -> None:
        spec = CacheSpec(check_name(format), recent, sink)
        if not spec.packed and format != REFERENCE:
            raise ValueError(f"format {format!r} is simulated, and a simulated cache takes no padding")
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        super().__init__(pretrained, backend="causal", **kwargs)
        self.spec, self.chunk = spec, chunk
        self.packed_tokens_read = 0
        self._loaded = LoadedModel(str(pretrained), self.model, self.tokenizer, None)
        self._new_cache()

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Token ids [B, T] with padding on the right -> logits [B, T, V]."""
        cache = self._new_cache()
        pieces = []
        with torch.inference_mode(), attention_for(self.model, cache):
            for begin, stop in chunks(inps.shape[1], self.chunk):
                pieces.append(self.model(inps[:, begin:stop], past_key_values=cache, use_cache=True).logits)
        expected = len(inps) * sum(self._packed(begin) for begin, _ in chunks(inps.shape[1], self.chunk))
        self._count(cache, expected)
        return torch.cat(pieces, 1)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """Prompts [B, P] with padding on the left -> [B, P + new]."""
        cache = self._new_cache()
        with attention_for(self.model, cache):
            out = super()._model_generate(context, max_length, stop, past_key_values=cache, **generation_kwargs)
        if generation_kwargs.get("num_beams", 1) == 1:
            mask = generation_kwargs.get("attention_mask")
            lengths = [context.shape[1]] * len(context) if mask is None else mask.sum(1).tolist()
            steps = out.shape[1] - context.shape[1] - 1
            self._count(cache, sum(self._packed(length + step) for length in lengths for step in range(steps)))
        return out

    def _new_cache(self) -> Any:
        return self.spec.new(self._loaded)

    def _packed(self, tokens: int) -> int:
        return self.spec.packed_tokens(self.model.config, tokens)

    def _count(self, cache: Any, expected: int) -> None:
        if cache.packed_tokens_read != expected:
            raise PackedReadsError(
                f"{cache.packed_tokens_read} packed tokens were read of the {self.spec.name} cache, not {expected}"
            )
        self.packed_tokens_read += expected


def main() -> None:
    """The harness's command line."""
    cli_evaluate()


if __name__ == "__main__":
    main()
