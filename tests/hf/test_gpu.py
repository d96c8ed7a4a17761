"""TurboCache on a GPU: generation with the embedded model, and the memory of a Llama-3.1-8B-shaped one at 32k tokens."""

from __future__ import annotations

import gc
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
CONTEXT = 32768
VOCABULARY = 4096
LAYERS, KV_HEADS, HEAD_DIM = 32, 8, 128
CLOSE = 0.05
"""What logits of the first tokens may differ by."""
NEAR = 0.01
"""Mean KL divergence of later tokens, in nats. A rounding in one token's vectors moves codes of the next ones: within ten tokens an
error of 1e-4 in attention becomes one of the size of the quantisation itself."""


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_embedded_model_goes_on_the_same_way_on_every_backend(backend: str, record_property: Any) -> None:
    if embedded_folder() is None:
        pytest.skip("the embedded model is not here")
    model = load_model(device="cuda", dtype="float32").model
    model.set_attn_implementation("kvturbo")
    prompt = torch.randint(5, model.config.vocab_size, (2, 700), generator=torch.Generator().manual_seed(3)).cuda()
    options: dict[str, Any] = {"max_new_tokens": 48, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    texts, logits = [], []
    for name in ("reference", backend):
        past = TurboCache(model.config, "k4v4", backend=name)
        got = model.generate(prompt, past_key_values=past, output_scores=True, return_dict_in_generate=True, **options)
        assert past.packed_tokens == 2 * model.config.num_hidden_layers * (700 + 47)
        texts.append(got.sequences[:, 700:])
        logits.append(torch.stack(got.scores, 1).float())  # [2, 48, vocabulary]
    assert torch.equal(texts[0][:, :3], texts[1][:, :3])
    first = float((logits[0] - logits[1])[:, :4].abs().max())
    divergence = 0.0
    for row in range(2):
        same = int((texts[0][row] == texts[1][row]).long().cumprod(0).sum())
        p, q = (x[row, : same + 1].log_softmax(-1) for x in logits)
        divergence = max(divergence, float((p.exp() * (p - q)).sum(-1).mean()))
    record_property("first_logits", first)
    record_property("mean_divergence", divergence)
    assert first <= CLOSE
    assert divergence <= NEAR


@pytest.fixture(scope="module")
def llama() -> Any:
    """Random weights in the shape of Llama-3.1-8B but for the vocabulary."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=4096, intermediate_size=14336, num_hidden_layers=LAYERS, num_attention_heads=32,
        num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, max_position_embeddings=131072, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.set_attn_implementation("kvturbo")
    return model


def bytes_asked_for(which: str) -> int:
    """Bytes of the tensors alive now ("current") or of the most since `in_use` ("peak"), without the allocator's rounding."""
    torch.cuda.synchronize()
    return int(torch.cuda.memory_stats()[f"requested_bytes.all.{which}"])


def in_use() -> int:
    """Bytes in use now; from here on the peak is counted."""
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    return bytes_asked_for("current")


def prefill(model: Any, tokens: Tensor) -> tuple[TurboCache, int, int]:
    """The cache after a chunked prefill, the most memory in use beside what was there before and the cache, and what stayed."""
    before = in_use()
    cache = TurboCache(model.config, "k4v4", max_tokens=tokens.shape[1] + 64)
    with torch.no_grad():
        for chunk in tokens.split(CHUNK, 1):
            model(chunk, past_key_values=cache, logits_to_keep=1)
    most = bytes_asked_for("peak")
    gc.collect()
    return cache, most - before - cache.nbytes(), bytes_asked_for("current") - before - cache.nbytes()


def test_peak_memory_is_the_pages_and_a_bounded_workspace(llama: Any, record_property: Any) -> None:
    tokens = torch.randint(5, VOCABULARY, (1, CONTEXT), device="cuda")
    prefill(llama, tokens[:, : 2 * CHUNK])  # what stays: kernels, constants, workspaces of the libraries
    half, workspace_of_half, _ = prefill(llama, tokens[:, : CONTEXT // 2])
    half_bytes = half.nbytes()
    del half
    cache, workspace, left = prefill(llama, tokens)
    one_layer = 2 * KV_HEADS * HEAD_DIM * 2 * CONTEXT  # 16-bit keys and values: 128 MiB
    before = in_use()
    out = llama.generate(
        torch.cat((tokens, tokens[:, :1]), 1), past_key_values=cache, max_new_tokens=8, do_sample=False
    )
    decoding = bytes_asked_for("peak") - before
    for name, value in (
        ("prefill", workspace),
        ("half_prefill", workspace_of_half),
        ("left", left),
        ("decode", decoding),
    ):
        record_property(f"{name}_mib", round(value / MIB, 1))
    assert out.shape[1] == CONTEXT + 1 + 8
    assert cache.nbytes() == pytest.approx(132 * KV_HEADS * LAYERS * (CONTEXT + 64), rel=2e-3)
    assert cache.nbytes() == pytest.approx(2 * half_bytes, rel=1e-2)
    assert left <= 1 * MIB, "something beside the cache stays"
    assert workspace - workspace_of_half <= 16 * MIB, "the workspace grows with the context"
    assert workspace <= 640 * MIB
    assert decoding <= one_layer / 2, "decoding makes a copy of a layer"
