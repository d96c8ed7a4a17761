"""Entry point of `kvturbo-lm-eval`: lm-evaluation-harness on a packed cache, or one line where it is not installed."""

from __future__ import annotations

import sys


def main() -> int:
    """Runs the harness's command line; returns its exit code."""
    try:
        from kvturbo.eval.lm_eval import main as run
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("lm_eval", "transformers"):
            raise
        print(f"kvturbo-lm-eval: needs {package}: pip install 'kvturbo[lm-eval]'", file=sys.stderr)
        return 1
    run()
    return 0
