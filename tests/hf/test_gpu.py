"""TurboCache on a GPU: generation with the embedded model, and the memory of a Llama-3.1-8B-shaped one at 32k tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from kvturbo.eval.model import embedded_folder, load_model
from kvturbo.hf import TurboCache

pytestmark = pytest.mark.gpu

MIB = 1 << 20
CHUNK = 2048
VOCABULARY = 4096


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_embedded_model_writes_the_same_text_on_every_backend(backend: str) -> None:
    if embedded_folder() is None:
        pytest.skip("the embedded model is not here")
    model = load_model(device="cuda", dtype="float32").model
    model.set_attn_implementation("kvturbo")
    prompt = torch.randint(5, model.config.vocab_size, (2, 700), generator=torch.Generator().manual_seed(3)).cuda()
    options: dict[str, Any] = {"max_new_tokens": 48, "do_sample": False, "pad_token_id": 0}
    texts = []
    for name in ("reference", backend):
        past = TurboCache(model.config, "k4v4", backend=name)
        texts.append(model.generate(prompt, past_key_values=past, **options))
        assert past.packed_tokens > 0
    first = (texts[0] != texts[1]).float().argmax(-1)
    same = (texts[0] == texts[1]).all(-1)
    assert (same | (first >= prompt.shape[1] + 16)).all(), f"texts part at {first.tolist()}"


@pytest.fixture(scope="module")
def llama() -> Any:
    """Random weights in the shape of Llama-3.1-8B but for the vocabulary."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=131072, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.set_attn_implementation("kvturbo")
    return model


def prefill(model: Any, tokens: Tensor) -> tuple[TurboCache, int]:
    """The cache after a chunked prefill, and the most memory that was in use beside what was there before and the cache."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    cache = TurboCache(model.config, "k4v4", max_tokens=tokens.shape[1] + 64)
    with torch.inference_mode():
        for chunk in tokens.split(CHUNK, 1):
            model(chunk, past_key_values=cache, logits_to_keep=1)
    torch.cuda.synchronize()
    return cache, torch.cuda.max_memory_allocated() - before - cache.nbytes()


def test_peak_memory_is_the_pages_and_a_bounded_workspace(llama: Any) -> None:
    tokens = torch.randint(5, VOCABULARY, (1, 32768), device="cuda")
    prefill(llama, tokens[:, : 2 * CHUNK])  # what stays: kernels, constants, workspaces of the libraries
    half, workspace_of_half = prefill(llama, tokens[:, :16384])
    half_bytes = half.nbytes()
    del half
    cache, workspace = prefill(llama, tokens)
    assert cache.nbytes() == pytest.approx(132 * 8 * 32 * (32768 + 64), rel=2e-3)
    assert cache.nbytes() == pytest.approx(2 * half_bytes, rel=1e-2)
    assert workspace - workspace_of_half <= 16 * MIB, "the workspace grows with the context"
    assert workspace <= 1024 * MIB
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = llama.generate(
        torch.cat((tokens, tokens[:, :1]), 1), past_key_values=cache, max_new_tokens=8, do_sample=False
    )
    assert out.shape[1] == 32768 + 1 + 8
    assert torch.cuda.max_memory_allocated() - before <= 64 * MIB, "decoding makes copies"
