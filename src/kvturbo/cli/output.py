"""How commands print: one JSON object or text on stdout; progress goes to stderr."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from kvturbo.eval.report import to_json


def print_json(data: Any) -> None:
    """Writes one JSON object to stdout."""
    sys.stdout.write(to_json(data))


def progress(total: int | None, what: str, unit: str = "it") -> Any:
    """A progress bar on stderr, for work that may take more than a second."""
    return tqdm(total=total, desc=what, unit=unit, file=sys.stderr, leave=False, dynamic_ncols=True)
