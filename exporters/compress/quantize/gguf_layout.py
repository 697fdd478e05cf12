"""Which type each matrix of a model has in one of llama.cpp's schemes.

llama.cpp decides by a matrix's name, its layer's place and its number of columns, in rules that change with its
versions; so it is asked: given a file with two rows of zeros for every matrix, it quantises that as it would the whole.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from skipstone.exporters.checkpoint import Checkpoint
from skipstone.exporters.formats.gguf.parts import GgufModel, TensorPart, string, write_parts
from skipstone.exporters.formats.gguf.schemes import Scheme
from skipstone.exporters.formats.gguf.whole import layout_of
from skipstone.exporters.isolation import run_isolated


@dataclass(frozen=True)
class InMemory(Checkpoint):
    """A checkpoint whose weights are in memory: a model between two steps of compression.

    Attributes:
        weights: by name.
    """

    weights: Mapping[str, torch.Tensor]

    @cached_property
    def tensor_files(self) -> dict[str, Path]:
        return dict.fromkeys(self.weights, self.path)

    def tensor(self, name: str) -> torch.Tensor:
        return self.weights[name]


def gguf_types(model: Any, scheme: Scheme) -> dict[str, str]:
    """By the name of a model's weight, ggml's type in lower case, of all that the scheme quantises.

    Args:
        model: transformers' model, a decoder or a T5 that GGUF can hold.
        scheme: see `skipstone.exporters.formats.gguf.schemes`.

    Raises:
        CheckpointError: GGUF cannot hold it.
        ExportError: llama.cpp failed.
    """
    checkpoint = InMemory(Path("model"), "model", model.config, type(model).__name__, model.state_dict())
    layout = layout_of(checkpoint)
    rows = [_two_rows(name, shape) for name, shape in layout.shapes.items() if name in layout.sources]
    with tempfile.TemporaryDirectory(prefix="skipstone-") as folder:
        asked, answer = Path(folder) / "asked.gguf", Path(folder) / "answer.gguf"
        meta = layout.keys | {"tokenizer.ggml.model": string("none")}
        write_parts(asked, layout.arch, meta, rows)
        run_isolated(
            "skipstone.exporters.formats.gguf.schemes:quantize_file",
            source=str(asked), target=str(answer), file_type=scheme.file_type, imatrix=None, threads=1,
        )  # fmt: skip
        types = {name: part.type for name, part in GgufModel(answer).parts.items()}
    floats = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16)
    return {
        source.name: types[name].name.lower()
        for name, source in layout.sources.items()
        if types[name] not in floats
    }


def _two_rows(name: str, shape: tuple[int, ...]) -> TensorPart:
    small = (2, *shape[1:]) if len(shape) > 1 else shape  # one row alone is a vector to llama.cpp
    return TensorPart(name, small, gguf.GGMLQuantizationType.F32, lambda: np.zeros(small, np.float32))
