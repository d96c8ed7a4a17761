"""`kvturbo eval --server` on two servers of the embedded model; for `vllm/checks.py`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from vllm_engines import MEMORY_FLAGS, MODEL, serving

CHUNK, PORT = 256, 8741
FLAGS = (
    "--max-num-batched-tokens", str(CHUNK), "--max-num-seqs", str(CHUNK), "--no-enable-prefix-caching", "--enforce-eager",
    *MEMORY_FLAGS,
)  # fmt: skip
TASKS = {
    "text": {"texts": 4, "prefix": 2048, "scored": 512},
    "retrieval": {"prompts": 8},
    "frequent": {"prompts": 4},
    "generation": {"texts": 4, "prefix": 1024, "new": 32},
}
DIVERGES, COSTS = 0.02, 0.02
"""Bounds of the mean divergence from 16 bits, and of the loss over theirs, of `k4v4` in chunks of 256."""


def eval_of_servers() -> str:
    """A server with a packed cache and one with a 16-bit one are asked all tasks: the packed one diverges, and by little."""
    with (
        serving("--kv-cache-dtype", "turboquant", *FLAGS, port=PORT),
        serving(*FLAGS, port=PORT + 1),
        tempfile.TemporaryDirectory() as folder,
    ):
        options = [f"--set={task}.{name}={value}" for task, given in TASKS.items() for name, value in given.items()]
        command = [
            sys.executable, "-m", "kvturbo", "eval", "--model", str(MODEL), "--out", f"{folder}/results.json",
            "--server", f"http://127.0.0.1:{PORT}", "--reference", f"http://127.0.0.1:{PORT + 1}",
            "--server-chunk", str(CHUNK), "--tasks", *TASKS, *options,
        ]  # fmt: skip
        subprocess.run(command, check=True)
        tasks = json.loads(Path(folder, "results.json").read_text())["tasks"]
    rows = {task: tasks[task]["caches"] for task in TASKS}
    text, exact = rows["text"]["turboquant"], rows["text"]["16bit"]
    told = (
        f"divergence of at least {text['kl_lower_bound_mean']:.2e}, loss {text['nll']:.4f}, 16 bits {exact['nll']:.4f}"
    )
    assert 0 < text["kl_lower_bound_mean"] < DIVERGES and abs(text["nll"] - exact["nll"]) < COSTS, told
    unread = [task for task, row in rows.items() if not row["turboquant"]["packed_tokens_read_per_layer"]]
    assert not unread, f"nothing packed was read by {unread}"
    counts = [
        f"{task}: {row['turboquant']['packed_tokens_read_per_layer']} packed tokens" for task, row in rows.items()
    ]
    return f"{told}; {'; '.join(counts)}"
