"""Trains a variant of the embedded model whose queries and keys are normalised per head, as in Qwen3.

Starts from the embedded weights: every head's queries and keys are divided by their root mean square and multiplied by
gains that begin as what they are on average over a text, then all of it is trained on the same mixture of text and retrieval.
The result is a model folder for measurements; its weights are not kept in the repository.

    PYTHONPATH=src python models/train_qk_norm.py --minutes 2 --out build/hard/qk-norm          # one GPU, all included
    PYTHONPATH=src python models/train_qk_norm.py --smoke --steps 3 --out build/qk-norm-smoke   # tiny, on a CPU
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from corpus import collect
from data import encode
from tokenizers import Tokenizer
from train import FULL, Stage, Trainer, export, log, run
from transformers import LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from kvturbo.hf.calibration import moments_of_text

CORPUS_BYTES = 40_000_000
STAGES = (Stage(0.6, 2048, 32), Stage(1.0, 8192, 8))
LEARNING_RATE = 1e-3
SMOKE_STAGES, SMOKE_CORPUS = (Stage(1.0, 256, 2),), 1_000_000
COPIED = ("tokenizer.json", "tokenizer_config.json", "retrieval.json", "heldout.txt", "heldout.LICENSE")


def with_qk_norm(model: LlamaForCausalLM, ids: torch.Tensor) -> Qwen3ForCausalLM:
    """A Qwen3 with a Llama's weights, in fp32. Gains of the norms: the root mean square channel on token ids [1, N]."""
    old = model.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rope_parameters", "rms_norm_eps")
    names += ("tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
    normed = Qwen3ForCausalLM(Qwen3Config(**{name: getattr(old, name) for name in names})).float()
    weights = {name: tensor.float() for name, tensor in model.state_dict().items()}
    missing, unexpected = normed.load_state_dict(weights, strict=False)
    if unexpected or not all(name.endswith(("q_norm.weight", "k_norm.weight")) for name in missing):
        raise ValueError(f"model must be a plain Llama, got {type(model).__name__} with {unexpected or missing}")
    with torch.no_grad():
        for i, moments in moments_of_text(model, ids).items():
            attention = normed.model.layers[i].self_attn
            attention.q_norm.weight.fill_(moments.query.mean().sqrt())
            attention.k_norm.weight.fill_(moments.key.mean().sqrt())
    return normed


def texts(folder: Path, corpus_bytes: int, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids to train on, of this machine's Python installation, and those of the model's held-out text."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    documents = [document.text for document in collect(corpus_bytes, workers=workers) if document.split == "train"]
    train = encode(tokenizer, documents)
    log(f"{len(documents)} files, {len(train) / 1e6:.1f} M tokens")
    return train, encode(tokenizer, [(folder / "heldout.txt").read_text()])


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", type=Path, default=Path("models/kvturbo-12m"), help="the model to start from")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=2, help="from the start of the program to the end of training")
    parser.add_argument("--steps", type=int, help="a budget in steps instead of minutes")
    parser.add_argument("--stop-after", type=int, help="leave after this many steps, the budget unspent")
    parser.add_argument("--workers", type=int, default=2, help="processes that read the corpus")
    parser.add_argument("--loader-workers", type=int, default=2, help="processes that make batches, per stage")
    parser.add_argument("--smoke", action="store_true", help="short sequences and a small corpus")
    return parser.parse_args()


def main() -> None:
    """Weights, text, training, export."""
    arguments = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if (arguments.init / name).is_file():
            shutil.copy(arguments.init / name, arguments.out / name)
    recipe = replace(FULL, stages=STAGES, learning_rate=LEARNING_RATE)
    if arguments.smoke:
        recipe = replace(recipe, stages=SMOKE_STAGES, probe=())
    train, heldout = texts(arguments.init, SMOKE_CORPUS if arguments.smoke else CORPUS_BYTES, arguments.workers)
    if arguments.smoke:
        heldout = heldout[:2048]
    ids = torch.from_numpy(heldout[:2048].astype(np.int64))[None]
    model = with_qk_norm(LlamaForCausalLM.from_pretrained(arguments.init, dtype=torch.float32), ids)
    trainer = Trainer(recipe, device, model)
    log(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters on {device}")
    run(trainer, train, heldout, arguments, arguments.out / "checkpoint.pt")
    export(trainer, arguments.out)
    (arguments.out / "checkpoint.pt").unlink()


if __name__ == "__main__":
    main()
