"""A Hugging Face checkpoint on disk: found by folder or hub name, its task inferred, its tensors read one at
a time.

    >>> checkpoint = open_checkpoint("samples/models/coder")
    >>> checkpoint.architecture
    'LlamaForCausalLM'

Weights are read from safetensors alone: nothing here unpickles.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from skipstone.errors import CheckpointError
from skipstone.runtimes.quiet import quiet_libraries

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

_Found = TypeVar("_Found")

FACTORS_FILE = "factors.safetensors"  # see `skipstone.exporters.factors`

_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
_WANTED_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model")
_ENCODER_DECODERS = ("T5ForConditionalGeneration",)
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder.

    Attributes:
        path: the folder.
        source: what the user named it by: the folder or the hub name.
        config: its parsed configuration, defaults filled in.
        architecture: the class in the configuration's `architectures`.
    """

    path: Path
    source: str
    config: PretrainedConfig
    architecture: str

    @property
    def name(self) -> str:
        """Short name: the last part of the folder or hub name."""
        return self.path.name if Path(self.source).exists() else self.source.rsplit("/", 1)[-1]

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether an encoder reads a source for the decoder to attend to."""
        return bool(self.config.is_encoder_decoder)

    @cached_property
    def tensor_files(self) -> dict[str, Path]:
        """Tensor name → the safetensors file that holds it."""
        return _locate_tensors(self.path)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, in the type it is stored in.

        Raises:
            CheckpointError: the tensor is missing or its file cannot be read.
        """
        tensor: torch.Tensor = self._stored(name, lambda file: file.get_tensor(name))
        return tensor

    def stored_type(self, name: str) -> str:
        """The type that a tensor is stored in, as safetensors names it (`BF16`), without reading the tensor.

        Raises:
            CheckpointError: as `tensor`.
        """
        return self._stored(name, lambda file: str(file.get_slice(name).get_dtype()))

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder, {} where there is none."""
        return _read_json(self.path / name) if (self.path / name).is_file() else {}

    def _stored(self, name: str, read: Callable[[Any], _Found]) -> _Found:
        """What `read` makes of the opened file that holds the tensor."""
        from safetensors import SafetensorError, safe_open

        file = self.tensor_files.get(name)
        if file is None:
            raise CheckpointError(
                f"{self.path}: tensor {name} not found", hint="the checkpoint is incomplete"
            )
        try:
            with safe_open(file, framework="pt") as stored:
                return read(stored)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: {name}: {error}", hint="download the checkpoint again") from error


def open_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint folder, or fetch one by its hub name (HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE are
    honoured).

    Raises:
        CheckpointError: not found, not a checkpoint, a task other than text generation, or an encoder-decoder that is
            no T5.
    """
    folder = find_folder(source)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: no config.json found",
            hint="pass a Hugging Face checkpoint folder, its hub name or a .gguf file",
        )
    with quiet_libraries():  # transformers loads what quantisers it finds, and those write what they lack
        config = _read_config(folder)
    architectures = config.architectures or ()
    if len(architectures) != 1:
        raise CheckpointError(
            f"{folder}/config.json: architectures is {list(architectures)}, one name was expected",
            hint="add the model class, say LlamaForCausalLM",
        )
    with quiet_libraries():
        _check_task(folder, architectures[0])
    return Checkpoint(folder, os.fspath(source), config, architectures[0])


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' own progress bar, which would write across ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def find_folder(source: str | os.PathLike[str]) -> Path:
    """A checkpoint's folder, fetched if a hub name is given; nothing in it is read, and torch is not needed.

    Raises:
        CheckpointError: not found.
    """
    folder, named = Path(source), os.fspath(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{named}: a file that is neither a checkpoint folder nor a .gguf file")
    if not _HUB_NAME.match(named):
        raise CheckpointError(
            f"{named}: no such folder", hint="pass a checkpoint folder, a hub name or a .gguf file"
        )
    return _fetch(named)


def load_eager(folder: Path) -> Any:
    """A checkpoint's language model, a causal one or an encoder-decoder, in float32 with transformers' plain attention:
    what artefacts are held against. Its weights take no gradients.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    model: Any
    with quiet_loading():
        if AutoConfig.from_pretrained(folder).is_encoder_decoder:
            with quiet_libraries():  # which say at length that Flan-T5's head is its own
                model = AutoModelForSeq2SeqLM.from_pretrained(folder, **kind)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, **kind)
    return model.eval().requires_grad_(False)


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(_WANTED_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name}: no such folder, and the hub gave nothing: {reason}",
            hint="check the spelling and the network, unset HF_HUB_OFFLINE, or pass a local folder",
        ) from error


def _read_config(folder: Path) -> PretrainedConfig:
    from transformers import AutoConfig

    raw = _read_json(folder / "config.json")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder)
        return config
    except Exception as error:  # transformers raises many kinds here, its validators included
        named = raw.get("architectures") or [raw.get("model_type")]
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{folder}/config.json: transformers cannot read the configuration of {named[0]}: {reason}",
            hint="architectures that need remote code are not supported; a converted .gguf may be",
        ) from error


def _check_task(folder: Path, architecture: str) -> None:
    import transformers
    from optimum.exporters.tasks import TasksManager

    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise CheckpointError(
            f"{folder}/config.json: transformers {transformers.__version__} has no {architecture}",
            hint="pass a checkpoint of an architecture listed in docs/export.md, or a converted .gguf",
        )
    try:
        task = TasksManager.infer_task_from_model(model_class)
    except (ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}/config.json: {architecture}: no task is known for it: {error}"
        ) from error
    if task == "text2text-generation" and architecture not in _ENCODER_DECODERS:
        raise CheckpointError(
            f"{folder}/config.json: {architecture} is an encoder-decoder; of these only "
            f"{', '.join(_ENCODER_DECODERS)} is supported",
            hint="pass a T5, Flan-T5 or CodeT5, or a decoder-only checkpoint",
        )
    if task not in ("text-generation", "text2text-generation"):
        raise CheckpointError(
            f"{folder}/config.json: {architecture} does {task}, text-generation was expected",
            hint="pass a causal language model",
        )


def _locate_tensors(folder: Path) -> dict[str, Path]:
    from safetensors import SafetensorError, safe_open

    index, single = folder / _INDEX, folder / _SINGLE
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: no weight_map found", hint="download the checkpoint again")
        # The names come from outside: only files of this folder are opened.
        return {name: folder / Path(str(file)).name for name, file in weight_map.items()}
    if not single.is_file():
        raise CheckpointError(
            f"{folder}: neither {_SINGLE} nor {_INDEX} found",
            hint="save the model with save_pretrained(...), as safetensors; pickled weights are not read",
        )
    try:
        with safe_open(single, framework="pt") as stored:
            return dict.fromkeys(stored.keys(), single)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{single}: not a readable safetensors file: {error}", hint="download the checkpoint again"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}", hint="restore the file") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: a JSON object was expected, found {type(content).__name__}")
    return content
