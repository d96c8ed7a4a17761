"""Collects training text from a Python installation, offline, under permissive licences only.

Sources are the standard library (PSF) and the installed distributions whose metadata names nothing but licences of
``ALLOWED``. A file that names another licence near its head is left out, so is every vendored folder. The record of
what was taken is ``corpus.json`` (per distribution) and ``corpus_files.tsv.gz`` (per file, with sha256). Held-out files
are never trained on; some of them are kept whole in ``heldout.txt``.

    python models/corpus.py --out build/corpus --megabytes 50
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.metadata
import json
import platform
import random
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ALLOWED = {
    "PSF-2.0", "Python-2.0", "MIT", "MIT-0", "BSD-2-Clause", "BSD-3-Clause", "0BSD", "Apache-2.0", "CC0-1.0",
    "Unlicense",
}  # fmt: skip
CLASSIFIERS = {
    "MIT License": "MIT",
    "BSD License": "BSD-3-Clause",
    "Apache Software License": "Apache-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "The Unlicense (Unlicense)": "Unlicense",
    "CC0 1.0 Universal (CC0 1.0) Public Domain Dedication": "CC0-1.0",
    "Public Domain": "CC0-1.0",
}
LICENSE_FIELD = {
    "mit": "MIT",
    "mit license": "MIT",
    "the mit license": "MIT",
    "bsd": "BSD-3-Clause",
    "bsd license": "BSD-3-Clause",
    "bsd-3-clause": "BSD-3-Clause",
    "bsd 3-clause": "BSD-3-Clause",
    "3-clause bsd": "BSD-3-Clause",
    "3-clause bsd license": "BSD-3-Clause",
    "bsd 3-clause license": "BSD-3-Clause",
    "new bsd": "BSD-3-Clause",
    "bsd-2-clause": "BSD-2-Clause",
    "apache": "Apache-2.0",
    "apache-2.0": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache 2": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "psf-2.0": "PSF-2.0",
    "psf": "PSF-2.0",
}
FOREIGN = re.compile(
    r"\bA?L?GPL|General Public Licen|\bMPL\b|Mozilla Public|Creative Commons|CC[- ]BY|\bEPL\b|Eclipse Public|CDDL|SSPL"
    r"|proprietary|confidential|NVIDIA|Intel Corporation|Academic Free|Artistic Licen|Boost Software|zlib licen"
    r"|SPDX-License-Identifier:(?!\s*\(?(?:PSF-2\.0|Python-2\.0|MIT|MIT-0|BSD-[23]-Clause|0BSD|Apache-2\.0|CC0-1\.0|Unlicense)\b)",
    re.IGNORECASE,
)
HEAD_CHARACTERS = 6000
SUFFIXES = (".py", ".pyi", ".md", ".rst")
SKIPPED_PARTS = {
    "_vendor", "_vendored", "vendor", "vendored", "third_party", "extern", "externals", "site-packages",
    "dist-packages", "_bundled", "encodings",
}  # fmt: skip
SKIPPED_NAMES = re.compile(r"licen[cs]e|copying|notice|authors", re.IGNORECASE)
FILE_BYTES = range(500, 150_001)
DISTRIBUTION_BYTES = 40_000_000

# Plain PSF modules with much prose in them: the committed sample of held-out text.
SAMPLE_MODULES = (
    "argparse.py", "statistics.py", "fractions.py", "heapq.py", "textwrap.py", "random.py", "contextlib.py",
    "tempfile.py", "functools.py", "queue.py", "sched.py", "bisect.py", "graphlib.py", "calendar.py", "string.py",
    "glob.py", "shelve.py", "configparser.py", "getpass.py", "copy.py",
)  # fmt: skip
SAMPLE_BYTES = 390_000


@dataclass(frozen=True)
class Document:
    """One file: where it comes from, its text, and whether it is held out of training."""

    distribution: str
    version: str
    licence: str
    path: str
    sha256: str
    size: int
    text: str
    split: str

    def row(self) -> str:
        """The file's line in the manifest."""
        return "\t".join(
            (self.distribution, self.version, self.licence, self.path, self.sha256, str(self.size), self.split)
        )


def licence_of(metadata: importlib.metadata.PackageMetadata) -> str | None:
    """SPDX expression of a distribution when every licence it names is allowed, else None."""
    expression = metadata.get("License-Expression")
    if expression:
        names = set(re.findall(r"[A-Za-z0-9.+-]+", expression)) - {"AND", "OR"}
        return expression if names <= ALLOWED else None
    classifiers = [c.split(" :: ")[-1] for c in metadata.get_all("Classifier") or [] if c.startswith("License ::")]
    specific = [c for c in classifiers if c != "OSI Approved"]
    if specific:
        return " AND ".join(sorted({CLASSIFIERS[c] for c in specific})) if set(specific) <= set(CLASSIFIERS) else None
    return LICENSE_FIELD.get((metadata.get("License") or "").strip().lower())


def _wanted(path: Path) -> bool:
    return (
        path.suffix in SUFFIXES
        and not SKIPPED_NAMES.search(path.name)
        and not SKIPPED_PARTS.intersection(path.parts)
        and path.name not in SAMPLE_MODULES
    )


def _distribution_files() -> Iterator[tuple[str, str, str, str, str]]:
    """Yields (name, version, licence, path in the distribution, path on disk)."""
    seen = set()
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        licence = licence_of(distribution.metadata)
        if licence is None or name in seen or name.lower().startswith(("nvidia", "cuda")):
            continue
        seen.add(name)
        for entry in distribution.files or ():
            if _wanted(Path(str(entry))) and ".." not in entry.parts:
                yield name, distribution.version, licence, str(entry), str(distribution.locate_file(entry))


def _library_files(root: Path) -> Iterator[tuple[str, str, str, str, str]]:
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if _wanted(relative):
            yield "cpython", platform.python_version(), "PSF-2.0", str(relative), str(path)


def read_document(source: tuple[str, str, str, str, str]) -> Document | None:
    """The file as a document, or None when its size, encoding, content or licence rules it out."""
    name, version, licence, relative, location = source
    path = Path(location)
    if not path.is_file() or path.is_symlink() or path.stat().st_size not in FILE_BYTES:
        return None
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    letters = sum(map(str.isalpha, text[:20_000]))
    if FOREIGN.search(text[:HEAD_CHARACTERS]) or letters < 0.45 * min(len(text), 20_000):
        return None
    digest = hashlib.sha256(data).hexdigest()
    held = int(hashlib.sha256(f"{name}/{relative}".encode()).hexdigest(), 16) % 50 == 0
    return Document(name, version, licence, relative, digest, len(data), text, "heldout" if held else "train")


def _capped(documents: list[Document], total: int, seed: int) -> list[Document]:
    """A random choice of documents without duplicates, at most ``total`` bytes and a share of it per distribution."""
    random.Random(seed).shuffle(documents)
    kept, digests, taken = [], set(), defaultdict(int)
    for document in documents:
        limit = total if document.distribution == "cpython" else min(DISTRIBUTION_BYTES, total)
        full = taken[document.distribution] + document.size > limit or sum(taken.values()) + document.size > total
        if document.sha256 in digests or full:
            continue
        digests.add(document.sha256)
        taken[document.distribution] += document.size
        kept.append(document)
    return kept


def collect(total: int, seed: int = 0, workers: int = 1) -> list[Document]:
    """Documents of at most ``total`` bytes, in random order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = [*_library_files(root), *_distribution_files()]
    with ProcessPoolExecutor(workers) as pool:
        documents = [document for document in pool.map(read_document, sources, chunksize=64) if document is not None]
    return _capped(documents, total, seed)


def sample_documents() -> list[Document]:
    """The modules of the committed held-out text, in the order of ``SAMPLE_MODULES``, at most ``SAMPLE_BYTES``."""
    root, documents, size = Path(sysconfig.get_paths()["stdlib"]), [], 0
    for name in SAMPLE_MODULES:
        document = read_document(("cpython", platform.python_version(), "PSF-2.0", name, str(root / name)))
        if document is not None and size + document.size <= SAMPLE_BYTES:
            documents.append(Document(**{**vars(document), "split": "sample"}))
            size += document.size
    return documents


def write_manifest(documents: list[Document], folder: Path) -> None:
    """Writes ``corpus.json`` (per distribution) and ``corpus_files.tsv.gz`` (per file) into ``folder``."""
    summary: dict[str, dict[str, object]] = {}
    for name in sorted({document.distribution for document in documents}):
        own = [document for document in documents if document.distribution == name]
        summary[name] = {
            "version": own[0].version,
            "licence": own[0].licence,
            "files": {split: sum(d.split == split for d in own) for split in sorted({d.split for d in own})},
            "bytes": sum(document.size for document in own),
        }
    head = "distribution\tversion\tlicence\tpath\tsha256\tbytes\tsplit"
    table = "\n".join([head, *sorted(document.row() for document in documents)]) + "\n"
    packed = gzip.compress(table.encode(), mtime=0)
    (folder / "corpus_files.tsv.gz").write_bytes(packed)
    totals = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "files": len(documents),
        "bytes": sum(document.size for document in documents),
        "corpus_files_sha256": hashlib.sha256(packed).hexdigest(),
        "distributions": summary,
    }
    (folder / "corpus.json").write_text(json.dumps(totals, indent=1) + "\n")


def main() -> None:
    """Collects, writes the manifest and the held-out sample, and prints what was taken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, default=50)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    documents = collect(int(arguments.megabytes * 1e6), workers=arguments.workers)
    sample = sample_documents()
    write_manifest([*documents, *sample], arguments.out)
    (arguments.out / "heldout.txt").write_text("\n\n".join(document.text for document in sample))
    print(f"{len(documents)} files, {sum(d.size for d in documents) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
