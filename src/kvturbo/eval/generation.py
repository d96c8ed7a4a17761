"""Generation with a given cache, streamed and timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from kvturbo.eval.caches import attention_for
from kvturbo.eval.model import LoadedModel


@dataclass(frozen=True)
class Generated:
    """What came out, how long it took, and what the cache held at the end.

    Attributes:
        text: the new text; new_ids: its tokens.
        prompt_tokens, new_tokens, cache_tokens: counts; the last token is not in the cache.
        prompt_seconds: until the first new token.
        tokens_per_second: of the tokens after the first, None if there is no other.
        cache_bytes: measured; sixteen_bit_bytes: of the same tokens in 16 bits.
    """

    text: str
    new_ids: list[int]
    prompt_tokens: int
    new_tokens: int
    cache_tokens: int
    prompt_seconds: float
    tokens_per_second: float | None
    cache_bytes: int
    sixteen_bit_bytes: int

    def facts(self) -> dict[str, Any]:
        """As a dictionary, without the token ids."""
        return {key: value for key, value in asdict(self).items() if key != "new_ids"}


class _Streamer(TextStreamer):
    """Passes text on as it comes and notes when."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.times = write, [time.perf_counter()]

    def put(self, value: Tensor) -> None:
        is_prompt = self.next_tokens_are_prompt
        super().put(value)
        if not is_prompt:
            self.times.append(time.perf_counter())

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.write is not None:
            self.write(text)


@torch.inference_mode()
def generate(
    loaded: LoadedModel,
    cache: Any,
    ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    write: Callable[[str], None] | None = None,
) -> Generated:
    """Generates after a prompt of token ids [1, P] with an empty cache.

    Args:
        loaded: the model.
        cache: an empty transformers cache, packed or not.
        ids: the prompt.
        max_new_tokens: at most so many tokens; the model's end-of-text token ends earlier.
        temperature: 0 takes the likeliest token.
        seed: of torch's generator, used when temperature is above 0.
        write: gets the text piece by piece.
    """
    torch.manual_seed(seed)
    ids = ids.to(loaded.device)
    streamer = _Streamer(loaded.tokenizer, write)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with attention_for(loaded.model, cache):
        out = loaded.model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=max_new_tokens,
            streamer=streamer, **sampling,
        )  # fmt: skip
    new = out[0, ids.shape[1] :].tolist()
    first, last = streamer.times[1], streamer.times[-1]
    return Generated(
        text=loaded.tokenizer.decode(new, skip_special_tokens=True),
        new_ids=new,
        prompt_tokens=ids.shape[1],
        new_tokens=len(new),
        cache_tokens=cache.get_seq_length(),
        prompt_seconds=first - streamer.times[0],
        tokens_per_second=(len(new) - 1) / (last - first) if len(new) > 1 else None,
        cache_bytes=cache.nbytes(),
        sixteen_bit_bytes=cache.sixteen_bit_nbytes(),
    )
