"""Tokenizer and training batches of the embedded model: text and retrieval samples of random difficulty."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from corpus import Document
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import IterableDataset, get_worker_info

from kvturbo.eval.retrieval import RetrievalVocab, Sample, Setting, make_sample

VOCABULARY = 1024
SPECIAL = [f"<|{name}|>" for name in ("pad", "bos", "eos", "key", "val", "ask", "hop", "mark", "copy", "end")]
TOKENIZER_BYTES = 6_000_000

# Loss weights. Planted random tokens cannot be predicted; the answers are few, so they count more.
TEXT_WEIGHT = 1.0
HAYSTACK_WEIGHT = 0.3
QUESTION_WEIGHT = 0.1
ANSWER_WEIGHT = 4.0


def retrieval_vocab() -> RetrievalVocab:
    """The retrieval token ids of a tokenizer made by ``train_tokenizer``."""
    ids = {token.strip("<|>"): i for i, token in enumerate(SPECIAL) if token not in ("<|pad|>", "<|eos|>")}
    return RetrievalVocab(**ids, first_content=len(SPECIAL), size=VOCABULARY)


def train_tokenizer(documents: list[Document]) -> Tokenizer:
    """Byte-level BPE of ``VOCABULARY`` tokens; ``<|bos|>`` is put before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts, size = [], 0
    for document in documents:
        if document.split == "train" and size < TOKENIZER_BYTES:
            texts.append(document.text)
            size += document.size
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the files that ``AutoTokenizer`` reads, in the form that transformers 4 and 5 both know."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "pad_token": "<|pad|>",
        "additional_special_tokens": SPECIAL[3:],
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Token ids uint16 [N] of all texts, each between ``<|bos|>`` and ``<|eos|>``."""
    pieces = []
    for start in range(0, len(texts), 512):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + 512]):
            pieces.append(np.array([*encoding.ids, SPECIAL.index("<|eos|>")], dtype=np.uint16))
    return np.concatenate(pieces)


def draw_setting(rng: np.random.Generator, length: int) -> Setting:
    """A random task and difficulty for samples of ``length`` tokens: at most half records, a quarter questions."""
    task = str(rng.choice(["multikey", "needle", "hops", "copy"], p=[0.45, 0.1, 0.3, 0.15]))
    key_tokens, value_tokens, hops = int(rng.choice([2, 3, 3, 4])), int(rng.integers(1, 6)), 1
    if task == "hops":
        value_tokens, hops = key_tokens, int(rng.integers(2, 4))
    if task == "copy":
        key_tokens, value_tokens = 4, int(rng.integers(4, 28))
    one = Setting(task, length, hops, 1, key_tokens, value_tokens, 1, hops)
    most = max(1, length // 2 // (one.record_length * hops))
    chains = round(float(np.exp(rng.uniform(np.log(min(3, most)), np.log(most)))))
    chains = min(chains, 64) if task == "needle" else chains
    questions = max(1, min(chains, length // 4 // one.question_length))
    family = chains if task == "needle" else int(rng.choice([1, 2, 4, 4, 8, 8, 16]))
    return Setting(task, length, chains * hops, questions, key_tokens, value_tokens, family, hops)


def sample_weights(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and loss weights [T] of a retrieval sample, context and questions joined."""
    context = np.where(sample.record_positions, 0.0, HAYSTACK_WEIGHT)
    questions = np.where(sample.answer_positions, ANSWER_WEIGHT, QUESTION_WEIGHT)
    return np.concatenate([sample.context, sample.questions]), np.concatenate([context, questions])


@dataclass
class Batches(IterableDataset):  # type: ignore[type-arg]
    """Endless batches (ids int16 [B, length + 1], weights float32 [B, length + 1]); half the rows are plain text."""

    text: np.ndarray
    length: int
    rows: int
    seed: int

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        worker = get_worker_info()
        rng = np.random.default_rng([self.seed, self.length, worker.id if worker else 0])
        while True:
            yield self.batch(rng)

    def batch(self, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """One batch."""
        ids = np.empty((self.rows, self.length + 1), dtype=np.int16)
        weights = np.full(ids.shape, TEXT_WEIGHT, dtype=np.float32)
        vocab = retrieval_vocab()
        for row in range(self.rows):
            if row < self.rows // 2:
                start = int(rng.integers(0, len(self.text) - self.length))
                ids[row] = self.text[start : start + self.length + 1]
            else:
                setting = draw_setting(rng, self.length + 1)
                ids[row], weights[row] = sample_weights(make_sample(setting, self.text, vocab, rng))
        return torch.from_numpy(ids), torch.from_numpy(weights)
