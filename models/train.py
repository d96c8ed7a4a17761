"""Trains the embedded model: a small Llama with its own tokenizer that retrieves exactly from 8,192 tokens.

Everything is made on the machine it runs on: text from the Python installation, retrieval samples from
``kvturbo.eval.retrieval``. Checkpoints go to ``--work``; the finished model to ``--model``.

    PYTHONPATH=src python models/train.py --minutes 8                    # one GPU, all included
    PYTHONPATH=src python models/train.py --minutes 4 --resume           # continue from the last checkpoint
    PYTHONPATH=src python models/train.py --minutes 3 --init models/kvturbo-12m --from-progress 0.6
    PYTHONPATH=src python models/train.py --smoke --steps 20             # tiny, on a CPU
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from corpus import collect, sample_documents, write_manifest
from data import VOCABULARY, Batches, encode, retrieval_vocab, save_tokenizer, train_tokenizer
from tokenizers import Tokenizer
from torch.utils.data import DataLoader
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kvturbo.eval.retrieval import get_setting, make_sample, score

START = time.time()
WARMUP_STEPS = 100
CHECKPOINT_SECONDS = 60


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum: it ends when ``until`` of the budget is spent."""

    until: float
    length: int
    rows: int


@dataclass(frozen=True)
class Recipe:
    """Sizes of one training run. ``corpus_bytes`` counts text before tokenisation."""

    stages: tuple[Stage, ...]
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    corpus_bytes: int
    learning_rate: float
    probe: tuple[str, ...]


FULL = Recipe(
    (Stage(0.15, 512, 128), Stage(0.5, 2048, 32), Stage(1.0, 8192, 8)),
    hidden=384, layers=6, heads=6, kv_heads=2, intermediate=960, corpus_bytes=300_000_000, learning_rate=2e-3,
    probe=("multikey-1k", "multikey-4k", "multikey-8k", "hard-4k-4"),
)  # fmt: skip
SMOKE = Recipe(
    (Stage(0.5, 128, 4), Stage(1.0, 256, 2)),
    hidden=64, layers=2, heads=2, kv_heads=1, intermediate=96, corpus_bytes=4_000_000, learning_rate=2e-3,
    probe=("multikey-1k",),
)  # fmt: skip


def log(message: str) -> None:
    """A progress line with the seconds since the start."""
    print(f"{time.time() - START:6.0f}s {message}", flush=True)


def model_config(recipe: Recipe) -> LlamaConfig:
    """head_dim 128 and a context of 8,192 whatever the recipe."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=128,
        intermediate_size=recipe.intermediate,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def prepare(recipe: Recipe, model_folder: Path, work: Path, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out token ids. Collects the corpus and trains the tokenizer unless ``work`` has them."""
    cached = work / "tokens.npz"
    if not cached.exists():
        documents, sample = collect(recipe.corpus_bytes, workers=workers), sample_documents()
        log(f"corpus {len(documents)} files, {sum(d.size for d in documents) / 1e6:.1f} MB")
        write_manifest([*documents, *sample], model_folder)
        (model_folder / "heldout.txt").write_text("\n\n".join(document.text for document in sample))
        if not (model_folder / "tokenizer.json").exists():
            save_tokenizer(train_tokenizer(documents), model_folder)
            retrieval_vocab().save(model_folder)
        tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
        tokenizer.encode_special_tokens = True
        parts = {
            split: encode(tokenizer, [d.text for d in documents if d.split == split]) for split in ("train", "heldout")
        }
        np.savez(cached, **parts)
    tokens = np.load(cached)
    log(f"tokens {len(tokens['train']) / 1e6:.1f} M, held out {len(tokens['heldout']) / 1e6:.2f} M")
    return tokens["train"], tokens["heldout"]


class Trainer:
    """Model, optimiser and progress of a run; ``progress`` goes from 0 to 1 over the budget."""

    def __init__(self, recipe: Recipe, device: str, model: PreTrainedModel | None = None) -> None:
        torch.manual_seed(0)
        self.recipe, self.device = recipe, device
        self.model = (LlamaForCausalLM(model_config(recipe)) if model is None else model).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=recipe.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.05,
            fused=device == "cuda",
        )
        self.step = self.tokens = self.step_of_run = 0
        self.progress = self.seconds = 0.0
        if device == "cuda":
            for layer in self.model.model.layers:
                layer.compile(dynamic=False)

    def save(self, path: Path) -> None:
        """Writes the checkpoint under a temporary name first, so that a cut leaves the old one whole."""
        state = {name: getattr(self, name) for name in ("step", "tokens", "progress", "seconds")}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def load(self, path: Path) -> None:
        """Continues from a checkpoint of ``save``."""
        state = torch.load(path, map_location=self.device)
        self.model.load_state_dict(state.pop("model"))
        self.optimizer.load_state_dict(state.pop("optimizer"))
        for name, value in state.items():
            setattr(self, name, value)

    def load_weights(self, folder: Path) -> None:
        """Continues from an exported model and its counts, with a fresh optimiser."""
        facts = json.loads((folder / "training.json").read_text())
        self.step, self.tokens, self.seconds = facts["steps"], facts["tokens"], facts["training_seconds"]
        self.model.load_state_dict(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())

    def autocast(self) -> torch.autocast:
        """bf16 on a GPU, nothing on a CPU."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")

    def learn(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """One optimiser step; returns the weighted loss."""
        warmup = min(1.0, (self.step_of_run + 1) / WARMUP_STEPS)
        decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * self.progress))
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * warmup * decay
        ids = ids.to(self.device, non_blocking=True).long()
        weights = weights.to(self.device, non_blocking=True)[:, 1:].reshape(-1)
        with self.autocast():
            logits = self.model(input_ids=ids[:, :-1], use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(
            logits.float().view(-1, VOCABULARY), ids[:, 1:].reshape(-1), reduction="none"
        )
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.step_of_run, self.tokens = self.step + 1, self.step_of_run + 1, self.tokens + ids.numel()
        return loss.detach()

    @torch.no_grad()
    def heldout_loss(self, heldout: np.ndarray) -> float:
        """Mean loss in nats per token over the first eight windows of up to 4,096 tokens."""
        length = min(4096, len(heldout) // 8 - 1)
        ids = torch.from_numpy(heldout[: 8 * (length + 1)].astype(np.int64)).view(8, -1).to(self.device)
        with self.autocast(), torch.compiler.set_stance("force_eager"):
            logits = self.model(input_ids=ids[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().view(-1, VOCABULARY), ids[:, 1:].reshape(-1)).item()

    @torch.no_grad()
    def retrieval(self, name: str, text: np.ndarray, count: int = 4) -> float:
        """Exact match on a few samples of a named setting, seeds apart from those of the evaluation."""
        rng, right = np.random.default_rng(12345), []
        for _ in range(count):
            sample = make_sample(get_setting(name), text, retrieval_vocab(), rng)
            ids = torch.from_numpy(np.concatenate([sample.context, sample.questions]))[None].to(self.device)
            with self.autocast(), torch.compiler.set_stance("force_eager"):
                logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=len(sample.questions)).logits[0]
            right += score(logits, sample)
        return sum(right) / len(right)


def loaders(recipe: Recipe, text: np.ndarray, workers: int, seed: int, pin: bool) -> list[Iterator[list[torch.Tensor]]]:
    """One endless stream per stage, already filling its queue."""
    streams = []
    for stage in recipe.stages:
        batches = Batches(text, stage.length, stage.rows, seed)
        prefetch = 4 if workers else None
        streams.append(iter(DataLoader(batches, None, num_workers=workers, prefetch_factor=prefetch, pin_memory=pin)))
    return streams


def report(trainer: Trainer, loss: torch.Tensor, heldout: np.ndarray) -> None:
    """A progress line with held-out loss and a few retrieval samples."""
    probes = " ".join(f"{name} {trainer.retrieval(name, heldout):.3f}" for name in trainer.recipe.probe)
    log(
        f"{trainer.progress:5.1%} step {trainer.step} Mtok {trainer.tokens / 1e6:.0f} loss {loss.item():.3f} "
        f"held {trainer.heldout_loss(heldout):.3f} {probes}"
    )


def run(
    trainer: Trainer, text: np.ndarray, heldout: np.ndarray, arguments: argparse.Namespace, checkpoint: Path
) -> None:
    """Trains until the budget (seconds since the program started, or steps) is spent."""
    pin = trainer.device == "cuda"
    streams = loaders(trainer.recipe, text, arguments.loader_workers, trainer.step, pin)
    begin = saved = time.time()
    end, origin, first = START + 60 * arguments.minutes, trainer.progress, trainer.step
    spent_before = trainer.seconds
    loss = torch.zeros(())
    while trainer.progress < 1:
        stage = next(i for i, stage in enumerate(trainer.recipe.stages) if trainer.progress < stage.until)
        loss = trainer.learn(*next(streams[stage]))
        now = time.time()
        done = (trainer.step - first) / arguments.steps if arguments.steps else (now - begin) / (end - begin)
        trainer.progress = min(1.0, origin + (1 - origin) * done)
        trainer.seconds = spent_before + now - begin
        if trainer.step - first in (20, 200):
            log(f"step {trainer.step}: loss {loss.item():.3f}, {trainer.tokens / 1e6:.1f} Mtok")
        if now - saved > CHECKPOINT_SECONDS:
            saved = now
            report(trainer, loss, heldout)
            trainer.save(checkpoint)
        if arguments.stop_after and trainer.step - first >= arguments.stop_after:
            break
    trainer.save(checkpoint)
    report(trainer, loss, heldout)


def export(trainer: Trainer, folder: Path) -> None:
    """Writes weights in bf16, configurations (``rope_theta`` also where transformers 4 looks), ``training.json``."""
    exported = type(trainer.model)(trainer.model.config).to(torch.bfloat16)
    exported.load_state_dict(trainer.model.state_dict())
    exported.config.dtype = torch.bfloat16
    exported.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    exported.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 1e6}, indent=2) + "\n")
    facts = {
        "parameters": sum(p.numel() for p in exported.parameters()),
        "steps": trainer.step,
        "tokens": trainer.tokens,
        "training_seconds": round(trainer.seconds),
        "wall_seconds_of_last_run": round(time.time() - START),
        "device": torch.cuda.get_device_name() if trainer.device == "cuda" else "CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    log(f"exported {facts}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="from the start of the program to the end of training")
    parser.add_argument("--steps", type=int, help="a budget in steps instead of minutes")
    parser.add_argument("--stop-after", type=int, help="leave a checkpoint after this many steps, the budget unspent")
    parser.add_argument("--model", type=Path, default=Path("models/kvturbo-12m"))
    parser.add_argument("--work", type=Path, default=Path("build/train"))
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --work")
    parser.add_argument("--init", type=Path, help="continue from an exported model, with a fresh optimiser")
    parser.add_argument("--from-progress", type=float, help="where in the curriculum to continue, 0 to 1")
    parser.add_argument("--workers", type=int, default=2, help="processes that read the corpus")
    parser.add_argument("--loader-workers", type=int, default=2, help="processes that make batches, per stage")
    parser.add_argument("--smoke", action="store_true", help="a tiny model")
    return parser.parse_args()


def main() -> None:
    """Corpus, tokenizer, training, export."""
    arguments = parse_arguments()
    recipe = SMOKE if arguments.smoke else FULL
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for folder in (arguments.model, arguments.work):
        folder.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.work / "checkpoint.pt"
    text, heldout = prepare(recipe, arguments.model, arguments.work, arguments.workers)
    trainer = Trainer(recipe, device)
    if arguments.resume:
        trainer.load(checkpoint)
    if arguments.init is not None:
        trainer.load_weights(arguments.init)
    if arguments.from_progress is not None:
        trainer.progress = arguments.from_progress
    parameters = sum(p.numel() for p in trainer.model.parameters())
    log(f"{parameters / 1e6:.2f} M parameters on {device}, from step {trainer.step}, progress {trainer.progress:.2f}")
    run(trainer, text, heldout, arguments, checkpoint)
    export(trainer, arguments.model)


if __name__ == "__main__":
    main()
