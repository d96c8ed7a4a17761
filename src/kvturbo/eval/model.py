"""Models to measure: the embedded one, a folder, or one of the hub; and the prompts that come with them."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvturbo.eval.retrieval import RetrievalVocab

if TYPE_CHECKING:
    from kvturbo.eval.caches import CacheSpec
    from kvturbo.eval.registry import Record, Task

EMBEDDED = "kvturbo-12m"
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class PromptSource(ABC):
    """What tasks make prompts of: a tokenizer, a text to score and, where the model has one, a retrieval vocabulary.

    Attributes:
        name: the embedded model's name, the folder or the hub id.
        tokenizer: as transformers loaded it.
        folder: where the files lie, None for a model of the hub.
        text_path: the text to score; default: the model's own `heldout.txt`, else the embedded model's.
    """

    name: str
    tokenizer: Any
    folder: Path | None
    text_path: Path | None

    @property
    @abstractmethod
    def context(self) -> int | None:
        """Most tokens that the model takes, or None if nothing says."""

    @cached_property
    def text(self) -> np.ndarray:
        """Token ids of the text to score: [N] int64.

        Raises:
            FileNotFoundError: there is no text.
        """
        path = self.text_path or self._default_text()
        ids = self.tokenizer(path.read_text(encoding="utf-8"), verbose=False).input_ids
        return np.array(ids, dtype=np.int64)

    @cached_property
    def retrieval_vocab(self) -> RetrievalVocab:
        """Token ids of the retrieval format.

        Raises:
            FileNotFoundError: the model has no `retrieval.json`.
        """
        if self.folder is None or not (self.folder / "retrieval.json").is_file():
            raise FileNotFoundError(f"model {self.name!r} has no retrieval.json, which the retrieval task needs")
        return RetrievalVocab.load(self.folder)

    def _default_text(self) -> Path:
        folders = [folder for folder in (self.folder, embedded_folder()) if folder is not None]
        for folder in folders:
            if (folder / "heldout.txt").is_file():
                return folder / "heldout.txt"
        raise FileNotFoundError(f"no text to score: model {self.name!r} has no heldout.txt")


@dataclass
class LoadedModel(PromptSource):
    """A model with its tokenizer, and what tasks need to know of it.

    Attributes:
        name, tokenizer, folder, text_path: as in `PromptSource`.
        model: as transformers loaded it, in eval mode.
    """

    name: str
    model: Any
    tokenizer: Any
    folder: Path | None
    text_path: Path | None = None
    _channels: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def context(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def settings(self, specs: Sequence[CacheSpec]) -> dict[str, Any]:
        """The model and the windows: what records must share to be comparable."""
        windows = sorted({(str(spec.recent), str(spec.sink)) for spec in specs})
        return {
            "model": self.name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.device.type,
            "text": None if self.text_path is None else str(self.text_path.resolve()),
            "windows": [{"recent": recent, "sink": sink} for recent, sink in windows],
        }

    def check(self, task: Task) -> None:
        """Raises ValueError or FileNotFoundError unless the task can be run with this model."""
        task.check(self)

    def measure(self, task: Task, todo: Mapping[int, list[CacheSpec]]) -> Iterator[tuple[int, dict[str, Record]]]:
        """Runs prompts over the caches that each lacks, one after another; yields records by cache name."""
        for index, specs in todo.items():
            yield index, task.measure(self, index, specs)

    def outlier_channels(self, format: str) -> dict[int, torch.Tensor] | None:
        """Channels that an `-o` format stores apart, chosen from the weights, by layer; None for other formats."""
        if "-o" not in format:
            return None
        if format not in self._channels:
            from kvturbo.hf.outliers import channels_from_weights

            self._channels[format] = channels_from_weights(self.model, format)
        return self._channels[format]


def embedded_folder() -> Path | None:
    """The embedded model's folder: package data of a wheel, or `models/` of a checkout. None if it is in neither."""
    package = Path(__file__).resolve().parents[1]
    candidates = [package / "models" / EMBEDDED, package.parents[1] / "models" / EMBEDDED]
    return next((folder for folder in candidates if (folder / "model.safetensors").is_file()), None)


def load_model(
    name: str | None = None, *, device: str = "auto", dtype: str = "auto", text: Path | None = None
) -> LoadedModel:
    """Loads a causal language model and its tokenizer.

    Args:
        name: a folder or a hub id; None: the embedded model.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's own on a GPU, float32 on a CPU, where 16-bit
            arithmetic is slow or emulated on most machines.
        text: a text to score instead of the model's own.

    Raises:
        FileNotFoundError: there is no such folder, or no embedded model.
        ValueError: the device or the dtype is not one of the choices, or the files hold no causal language model.
    """
    target = _checked_device(device)
    wanted = _dtype(dtype, target)
    tokenizer, path = load_tokenizer(name)
    source = name if path is None else str(path)
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=wanted)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"can't load model {source!r}: {_first_line(error)}") from error
    label = EMBEDDED if name is None else name
    return LoadedModel(label, model.to(target).eval(), tokenizer, path, text)


def load_tokenizer(name: str | None) -> tuple[Any, Path | None]:
    """The tokenizer of a model and the folder where the model lies, None for one of the hub.

    Raises:
        FileNotFoundError: there is no such folder, or no embedded model.
        ValueError: the files hold no tokenizer.
    """
    path, hub_id = _find(name)
    from transformers import AutoTokenizer

    source = str(path) if path is not None else hub_id
    try:
        return AutoTokenizer.from_pretrained(source), path
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"can't load model {source!r}: {_first_line(error)}") from error


def _find(name: str | None) -> tuple[Path | None, str | None]:
    if name is None:
        folder = embedded_folder()
        if folder is None:
            raise FileNotFoundError(f"the embedded model {EMBEDDED} is not installed; name a model with --model")
        return folder, None
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve(), None
    if path.exists() or not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"model must be a folder or a hub id such as Qwen/Qwen2.5-0.5B, got {name!r}")
    return None, name


def _checked_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}") from error
    if target.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} is not there: {torch.cuda.device_count()} CUDA devices found")
    return target


def _dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    choices = ("auto", "float32", "bfloat16", "float16")
    if dtype not in choices:
        raise ValueError(f"dtype must be one of {', '.join(choices)}, got {dtype!r}")
    if dtype == "auto":
        return "auto" if device.type == "cuda" else torch.float32
    return getattr(torch, dtype)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
