"""An engine whose packed prefixes are attended in many small pieces, for `vllm/checks.py`: else it takes contexts and batches of
many thousand tokens to see a prefix cut, or several blocks of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from vllm_engines import CHUNK, close_losses, engine, generate, losses, prompts, sensible

CACHES = ("turboquant", "kvturbo_k4v4-o16", "kvturbo_k8v4", "kvturbo_lite4")
KEYS, ROWS = 128, 64
COPIES = 2 * KEYS * 4 * 2 * 128
"""Two short prefixes together, with the embedded model's 2 KV heads of 128."""
CHATS, CHAT_TOKENS = 16, 100


@contextmanager
def small() -> Iterator[None]:
    """Sizes of pieces for engines that start and end in it."""
    from kvturbo.vllm import pieces, prefill

    sizes = {"PIECE_TOKENS": KEYS, "COPY_BYTES": COPIES, "ROWS_AT_ONCE": ROWS}
    with patch.multiple(pieces, **sizes), patch.object(prefill, "ROWS_AT_ONCE", ROWS):
        yield


def small_pieces() -> str:
    """Prompts in chunks, whose prefixes are cut, and chats that go on at once, whose prefixes are joined by two: the loss is that
    of an engine with pieces of the usual size, and the texts are as good.
    """
    lines = []
    for cache_dtype in CACHES:
        options = {"max_num_batched_tokens": CHUNK, "enable_prefix_caching": True}
        with engine(cache_dtype, **options) as llm:
            usual = losses(llm, prompts())
        chats = prompts(CHATS, CHAT_TOKENS)
        with small(), engine(cache_dtype, **options) as llm:
            found = losses(llm, prompts())
            generate(llm, chats)
            again = generate(llm, chats)
        compared = close_losses(found, usual, 0.002, "in usual pieces")
        lines.append(f"{cache_dtype}: {compared}; {sensible(again, texts=chats)}")
    return "; ".join(lines)
