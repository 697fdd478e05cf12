"""Quantisation schemes of ONNX graphs.

For CPUs and GPUs, products with a weight matrix become ONNX Runtime's MatMulNBits:

    none    float32
    4w      int4 weights in blocks of 32 inputs, a scale each; everything else in float32
    8w      int8 weights, likewise
    8da4w   as 4w, and the products' other factor rounded to int8 while running, block by block: faster on CPUs
    8da8w   as 8w, likewise

For NPUs, which compute in integers (docs/qualcomm.md):

    a16w8   activations of 16 bits, weights of 8, scales fixed by calibration
    a16w4   likewise, weights of 4 bits but for the heads'
    a8w8    likewise, everything in 8 bits
    fp16    float16 throughout

With any but `none` the embeddings are kept in float16.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    DefaultWeightOnlyQuantizer,
)

from skipstone.exporters.formats.onnx.qdq import Rounding
from skipstone.exporters.formats.scheme_names import find_scheme

BLOCK = 32
OPERATOR, DOMAIN = "MatMulNBits", "com.microsoft"
_ROUNDED = 4  # MatMulNBits' accuracy_level: compute in int8


@dataclass(frozen=True)
class Scheme:
    """A scheme.

    Attributes:
        name: what `--quantize` is given.
        bits: of a weight; None: float32.
        rounds_while_running: whether activations are rounded as well.
        min_agreement: share of positions at which the best token must be the float32 model's.
        rounding: bits of everything, where activations have fixed scales.
        least_width: rows from which on a batch's width does not change what is computed.
        slack: see `skipstone.exporters.selftest.SelfTest`.
    """

    name: str
    bits: int | None
    rounds_while_running: bool
    min_agreement: float
    rounding: Rounding | None = None
    least_width: int = 1
    slack: float = 1.0

    @property
    def exact(self) -> bool:
        """Whether everything stays in float32."""
        return self.name == "none"


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("none", None, False, 0.99),
        Scheme("4w", 4, False, 0.5),
        Scheme("8w", 8, False, 0.9),
        Scheme("8da4w", 4, True, 0.5),
        Scheme("8da8w", 8, True, 0.8),
        Scheme("a16w8", 8, False, 0.9, Rounding(16, 8)),
        Scheme("a16w4", 4, False, 0.5, Rounding(16, 4)),
        Scheme("a8w8", 8, False, 0.5, Rounding(8, 8), least_width=4, slack=2.0),
        Scheme("fp16", 16, False, 0.95),
    )
}


def scheme_of(name: str) -> Scheme:
    """The scheme of that name; `f32` is `none`.

    Raises:
        UsageError: no such scheme; lists them.
    """
    return find_scheme(name, SCHEMES, format="onnx", docs="docs/onnx.md")


def quantize(graph: ir.Model, scheme: Scheme) -> None:
    """Quantise the weight matrices of a graph, in place."""
    if scheme.bits is None:
        return
    graph.graph.opset_imports[DOMAIN] = 1
    for node in list(graph.graph):
        if node.op_type == "MatMul" and _is_matrix(node.inputs[1]):
            _exchange(graph, node, scheme)


def _is_matrix(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and len(value.const_value.shape) == 2


def _exchange(graph: ir.Model, node: ir.Node, scheme: Scheme) -> None:
    """Put a MatMulNBits in a product's place; its weights are named after the product's."""
    left, right = node.inputs
    if left is None or right is None or right.const_value is None or scheme.bits is None:
        return
    weight = np.asarray(right.const_value.numpy(), np.float32)
    packed, scales = pack(weight, scheme.bits)
    weights = [
        _initializer(graph, f"{right.name}_Q{scheme.bits}", packed),
        _initializer(graph, f"{right.name}_scales", scales.reshape(-1)),
    ]
    inputs, outputs = weight.shape
    attributes = {"K": inputs, "N": outputs, "bits": scheme.bits, "block_size": BLOCK}
    if scheme.rounds_while_running:
        attributes["accuracy_level"] = _ROUNDED
    product = ir.node(OPERATOR, [left, *weights], attributes, domain=DOMAIN, name=node.name)
    made, before = product.outputs[0], node.outputs[0]
    made.shape, made.type, made.name = before.shape, before.type, before.name
    ir.convenience.replace_nodes_and_values(graph.graph, node, [node], [product], [before], [made])
    if not right.uses():
        del graph.graph.initializers[str(right.name)]


def pack(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Round a weight [inputs, outputs] symmetrically, by ONNX Runtime's own code.

    Returns:
        uint8 [outputs, blocks, bytes of a block], and the scales, float32 [outputs, blocks].
    """
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, bits=bits)
    packed, scales, _zeros = DefaultWeightOnlyQuantizer(config).qbits_block_quant(
        np.ascontiguousarray(weight)
    )
    return packed, scales


def unpack(packed: np.ndarray, scales: np.ndarray, inputs: int, bits: int) -> np.ndarray:
    """What a packed weight stands for, [inputs, outputs]: (q - 2^(bits - 1)) · scale, a byte's low half first."""
    whole = packed if bits == 8 else np.stack((packed & 15, packed >> 4), -1).reshape(*packed.shape[:2], -1)
    centred = whole.astype(np.float32) - 2 ** (bits - 1)
    values = centred * scales.reshape(*packed.shape[:2], 1)
    return np.ascontiguousarray(values.reshape(len(packed), -1)[:, :inputs].T)


def _initializer(graph: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.graph.register_initializer(value)
    return value
