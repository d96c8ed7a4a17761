"""How chunks are cut (shares.cuh), compiled for the host: every place belongs to the chunk that begins before it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kvturbo.ops.decode import variants

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

PROGRAM = r"""
#include <algorithm>
#include <cstdio>
using std::min;
#define DEV inline
%s
int main() {
  int checked = 0;
  for (int ctas = 1; ctas <= 24; ctas++) for (int per_rank = 1; per_rank <= ctas + 1; per_rank++)
  for (int taper = 0; taper < 4; taper++) for (int small = 1; small < 8; small += 3) for (int least = 1; least < 6; least += 2) {
    Shares x;
    x.ctas = ctas; x.per_rank = per_rank; x.taper = taper; x.small = small;
    x.big = (ctas - 1) / per_rank * taper + least;
    if (x.start(0) != 0 || x.start(x.chunks()) - x.start(ctas) != 2 * ctas * small) return 1;
    for (int c = 0; c < x.chunks(); c++) {
      const int size = x.start(c + 1) - x.start(c);
      if (size != (c < ctas ? x.big - c / per_rank * taper : small)) return 2;
      for (int place = x.start(c); place < x.start(c + 1); place++, checked++) if (x.chunk_of(place) != c) return 3;
    }
    if (x.tapered() != ctas * x.big - x.start(ctas)) return 4;
  }
  std::printf("%%d", checked);
  return 0;
}
"""


def test_chunks_are_where_they_begin(tmp_path: Path) -> None:
    source = tmp_path / "shares.cpp"
    source.write_text(PROGRAM % variants.SHARES.read_text())
    subprocess.run(["g++", "-O1", str(source), "-o", str(tmp_path / "shares")], check=True)
    found = subprocess.run([str(tmp_path / "shares")], capture_output=True, text=True, check=True)
    assert int(found.stdout) > 1_000_000
