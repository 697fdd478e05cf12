"""The uncut model in eager torch with the weights that a bundle's graphs hold, for the self-test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from skipstone.bundle import Bundle, GraphEntry, OnnxManifest, TableEntry, manifest_of
from skipstone.exporters.factors import load_factored
from skipstone.exporters.formats.onnx.schemes import OPERATOR, unpack

FloatArray = NDArray[np.float32]


class EagerDecoder:
    """See `skipstone.exporters.formats.Oracle`: transformers' model, its matrices and embeddings read out of the bundle.

    Args:
        bundle: what it is compared with.
        checkpoint: folder of the source.
    """

    def __init__(self, bundle: Bundle, checkpoint: str) -> None:
        graphs, model = manifest_of(bundle, OnnxManifest).graphs, load_factored(Path(checkpoint))
        model.lm_head.weight = as_parameter(model.lm_head.weight.detach().clone().numpy())  # untied
        for entry in graphs.graphs:
            if entry.part != "draft_head":
                _load(model, bundle, entry)
        model.model.embed_tokens.weight = as_parameter(read_table(bundle, graphs.embedding))
        self._model = model

    def logits(self, tokens: Sequence[int]) -> FloatArray:
        with torch.no_grad():
            logits = self._model(torch.tensor([list(tokens)])).logits[0]
        return np.asarray(logits.numpy(), np.float32)

    def draft_logits(self, hidden: FloatArray, token_ids: NDArray[np.int32]) -> FloatArray:
        decoder = self._model.model
        norm = decoder.norm if hasattr(decoder, "norm") else decoder.final_layernorm
        with torch.no_grad():
            logits = self._model.lm_head(norm(torch.from_numpy(hidden)))
        return np.asarray(logits.numpy()[:, token_ids], np.float32)


def _load(model: Any, bundle: Bundle, entry: GraphEntry) -> None:
    """Put a graph's matrices into the model's linear layers."""
    modules = dict(model.named_modules())
    for name, weight in matrices(ir.load(bundle.file(entry.file))):
        owner = name.removesuffix(".weight")
        place = "lm_head" if owner == "projection" else "model." + owner.replace(".layer_", ".", 1)
        modules[place].weight = as_parameter(weight.T)


def matrices(graph: ir.Model) -> Iterator[tuple[str, FloatArray]]:
    """Name and value [inputs, outputs] of every weight matrix that a graph multiplies with, quantised or not."""
    for node in graph.graph:
        right = node.inputs[1] if len(node.inputs) > 1 else None
        if right is None or right.const_value is None:
            continue
        held, name = right.const_value, str(right.name)
        if node.op_type == OPERATOR:
            bits, inputs = (node.attributes[key].as_int() for key in ("bits", "K"))
            scales = node.inputs[2]
            if scales is not None and scales.const_value is not None:
                weight = unpack(held.numpy(), scales.const_value.numpy(), inputs, bits)
                yield name.removesuffix(f"_Q{bits}"), weight
        elif node.op_type == "MatMul" and len(held.shape) == 2:
            yield name, np.asarray(held.numpy(), np.float32)


def read_table(bundle: Bundle, table: TableEntry) -> NDArray[Any]:
    """A bundle's embeddings, [rows, columns] in the type they are stored in."""
    rows = np.fromfile(bundle.file(table.file), f"<f{np.dtype(table.type).itemsize}")
    return rows.reshape(table.rows, table.columns)


def as_parameter(values: np.ndarray) -> nn.Parameter:
    """Float32 weights of a module, which take no gradients."""
    return nn.Parameter(torch.from_numpy(np.array(values, np.float32)), requires_grad=False)
