"""Retrieval with the embedded model in vLLM, for benchmarks/vllm_retrieval.py: answers that the engine writes, by cache dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from kvturbo.bench import vllm_recent
from kvturbo.eval.retrieval import RetrievalVocab, Sample, get_setting, samples

CACHE_DTYPES = ("auto", "fp8", "turboquant", "kvturbo_k4v4-o16")
SETTINGS = ("multikey-4k", "multikey-8k", "hard-4k", "hard-8k")
CHUNKS = (512, 8192)
"""Tokens that are read at once: what was read before a chunk is read from the cache by it. 8,192 is a whole prompt."""
CONCURRENT = 64
CACHE_BYTES = 6 << 30


@dataclass(frozen=True)
class Job:
    """An engine and what it is asked.

    Attributes:
        setting: of a lookup task.
        chunk: tokens that are read at once.
        cache_dtype: of the engine.
        recent: tokens of a ring; None leaves them to the engine.
    """

    setting: str
    chunk: int
    cache_dtype: str
    recent: int | None = None

    def __str__(self) -> str:
        rings = () if self.recent is None else (f"recent={self.recent}",)
        return " ".join([self.setting, str(self.chunk), self.cache_dtype, *rings])


def jobs(
    settings: Sequence[str], chunks: Sequence[int], cache_dtypes: Sequence[str], recent: Sequence[int | None] = (None,)
) -> list[Job]:
    """All engines, in the order in which they begin, one chunk after another; packed caches have one for every size of rings.

    Raises:
        ValueError: a setting is unknown, or a chunk has no tokens.
    """
    for setting in settings:
        get_setting(setting)
    if min(chunks) < 1:
        raise ValueError(f"chunks must have at least 1 token, got {', '.join(map(str, chunks))}")
    return [
        Job(setting, chunk, cache_dtype, size)
        for chunk, setting, cache_dtype in product(chunks, settings, cache_dtypes)
        for size in vllm_recent.asked(cache_dtype, recent)
    ]


@dataclass(frozen=True)
class Question:
    """A context with one question, and what must be written.

    Attributes:
        prompt: token ids.
        answer: token ids that follow.
        scored: which of them count.
    """

    prompt: list[int]
    answer: list[int]
    scored: list[bool]

    def right(self, written: Sequence[int]) -> bool:
        """Whether all tokens that count were written."""
        return len(written) == len(self.answer) and all(
            a == b for a, b, counts in zip(written, self.answer, self.scored, strict=True) if counts
        )


def questions_of(sample: Sample, opening: int) -> Iterator[Question]:
    """A sample's questions, each on its own after the context.

    Args:
        sample: of a lookup task.
        opening: tokens of a question that are given, those before the first that counts.
    """
    context = sample.context.tolist()
    count = sample.num_questions
    rows, scored = sample.questions.reshape(count, -1), sample.answer_positions.reshape(count, -1)
    for row, counts in zip(rows.tolist(), scored.tolist(), strict=True):
        yield Question(context + row[:opening], row[opening:-1], counts[opening:-1])  # the last token ends the question


def questions(setting: str, count: int, folder: Path) -> list[Question]:
    """So many questions of a setting, those of one context after another.

    Args:
        setting: of a lookup task.
        count: a multiple of the setting's questions per context.
        folder: of the model: its tokenizer, its held-out text and its retrieval.json.

    Raises:
        ValueError: count is no such multiple.
    """
    from tokenizers import Tokenizer

    facts = get_setting(setting)
    if count < 1 or count % facts.questions:
        raise ValueError(f"questions must be a positive multiple of {facts.questions} for {setting}, got {count}")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode((folder / "heldout.txt").read_text(), add_special_tokens=False).ids
    text, vocab = np.array(ids, dtype=np.int64), RetrievalVocab.load(folder)
    opening = 2 + facts.key_tokens
    made = samples(setting, count // facts.questions, text, vocab)
    return [question for sample in made for question in questions_of(sample, opening)]


def answers(job: Job, asked: Sequence[Question], folder: Path) -> list[bool]:
    """Which questions an engine answers rightly. Contexts are read in chunks and found again by prefix caching, answers are written
    token by token.
    """
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(folder), kv_cache_dtype=job.cache_dtype, dtype="bfloat16", skip_tokenizer_init=True, max_model_len=8192,
        max_num_seqs=CONCURRENT, max_num_batched_tokens=job.chunk, gpu_memory_utilization=0.1, kv_cache_memory_bytes=CACHE_BYTES,
        enable_prefix_caching=True, enforce_eager=True, seed=0, **vllm_recent.options(job.recent),
    )  # fmt: skip
    parameters = [
        SamplingParams(temperature=0, max_tokens=len(question.answer), ignore_eos=True, detokenize=False)
        for question in asked
    ]
    prompts: list[Any] = [{"prompt_token_ids": question.prompt} for question in asked]
    outputs = llm.generate(prompts, parameters, use_tqdm=False)
    return [question.right(output.outputs[0].token_ids) for question, output in zip(asked, outputs, strict=True)]


def rows_of(found: Mapping[Job, Sequence[bool]]) -> list[dict[str, Any]]:
    """A row per engine, with the paired difference from 16 bits in points where these were measured. `recent` is None for caches
    that are not packed.

    Args:
        found: whether each question was answered rightly, by engine.
    """
    rows = []
    for job, right in found.items():
        row = {
            "setting": job.setting, "chunk": job.chunk, "kv_cache_dtype": job.cache_dtype,
            "recent": vllm_recent.measured(job.cache_dtype, job.recent), "questions": len(right), "right": sum(right),
            "accuracy": sum(right) / len(right),
        }  # fmt: skip
        base = found.get(Job(job.setting, job.chunk, "auto"))
        paired: dict[str, float | None] = {"difference_points": None, "only_16bit_right": None, "only_this_right": None}
        if base is not None:
            pairs = list(zip(base, right, strict=True))
            paired = {
                "difference_points": 100 * (sum(right) - sum(base)) / len(right),
                "only_16bit_right": sum(a and not b for a, b in pairs),
                "only_this_right": sum(b and not a for a, b in pairs),
            }
        rows.append(row | paired)
    return rows
