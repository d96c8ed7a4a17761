"""Packed prefixes that are attended in many small pieces, and engines with such ones for `vllm/checks.py`: else it takes contexts
and batches of many thousand tokens to see a prefix cut, or several blocks of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from vllm_engines import CHUNK, close_losses, engine, generate, losses, prompts, sensible

CACHES = ("turboquant", "kvturbo_k4v4-o16", "kvturbo_k8v4", "kvturbo_lite4")
KEYS, ROWS = 128, 64
COPIES = 2 * KEYS * 4 * 2 * 128
"""Two short prefixes together, with the embedded model's 2 KV heads of 128."""
CHATS, CHAT_TOKENS = 16, 100


def cut(put: Callable[[Any, str, int], Any], keys: int, rows: int, copies: int = 0) -> None:
    """Makes pieces small: `put` sets a module's constant.

    Args:
        put: `setattr` of a patch.
        keys: of a prefix that is joined to others at most, and of a piece if `copies` hold fewer.
        rows: that see a piece at once.
        copies: bytes of a piece's copies.
    """
    from kvturbo.vllm import pieces, prefill

    put(pieces, "PIECE_TOKENS", keys)
    put(pieces, "COPY_BYTES", copies)
    for module in (pieces, prefill):
        put(module, "ROWS_AT_ONCE", rows)


@contextmanager
def small() -> Iterator[None]:
    """For engines that start and end in it."""
    with ExitStack() as patches:
        cut(lambda *constant: patches.enter_context(patch.object(*constant)), KEYS, ROWS, COPIES)
        yield


def small_pieces() -> str:
    """Prompts in chunks, whose prefixes are cut, and chats that go on at once, whose prefixes are joined by two: the loss is that
    of an engine with pieces of the usual size, and the texts are as good.
    """
    lines, chats = [], prompts(CHATS, CHAT_TOKENS)
    options = {"max_num_batched_tokens": CHUNK, "enable_prefix_caching": True}
    for cache_dtype in CACHES:
        with engine(cache_dtype, **options) as llm:
            usual = losses(llm, prompts())
        with small(), engine(cache_dtype, **options) as llm:
            found = losses(llm, prompts())
            generate(llm, chats)
            again = generate(llm, chats)
        compared = close_losses(found, usual, 0.002, "in usual pieces")
        lines.append(f"{cache_dtype}: {compared}; {sensible(again, texts=chats)}")
    return "; ".join(lines)
