"""RMS norms as one operator.

transformers spells a norm out: square, mean, root, reciprocal and two products. In integers every step would be rounded,
and Qualcomm's compiler, which recognises that spelling, fails on it in float16 ("Memory allocation related error").
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import onnx_ir as ir

NORM_OPSET = 23  # the first one with RMSNormalization
_STEPS = ("Pow", "ReduceMean", "Add", "Sqrt", "Reciprocal", "Mul", "Mul")


def fuse_norms(graph: ir.Model) -> int:
    """Put an RMSNormalization in the place of every RMS norm that is spelled out, in place.

    Returns:
        How many there were.
    """
    chains = [chain for node in graph.graph if (chain := _chain(node)) is not None]
    for chain in chains:
        _fuse(graph.graph, chain)
    if chains:
        graph.graph.opset_imports[""] = NORM_OPSET
    return len(chains)


def _chain(square: ir.Node) -> tuple[ir.Node, ...] | None:
    """The nodes of a norm from its square on; None where the node begins none."""
    chain = [square]
    if square.op_type != _STEPS[0]:
        return None
    for step in _STEPS[1:]:
        users = list(chain[-1].outputs[0].uses())
        if len(users) != 1 or users[0].node.op_type != step:
            return None
        chain.append(users[0].node)
    divided = chain[-2]  # what enters times the reciprocal
    return tuple(chain) if square.inputs[0] in divided.inputs else None


def _fuse(graph: ir.Graph, chain: Sequence[ir.Node]) -> None:
    square, _mean, shifted, *_rest, weighted = chain
    norm = ir.node(
        "RMSNormalization",
        [square.inputs[0], _constant(weighted)],
        {"axis": -1, "epsilon": float(_array(_constant(shifted)))},
        name=f"{square.name}_norm",
    )
    made, before = norm.outputs[0], weighted.outputs[0]
    made.shape, made.type, made.name = before.shape, before.type, before.name
    ir.convenience.replace_nodes_and_values(graph, weighted, [weighted], [norm], [before], [made])
    for node, _next in reversed(list(pairwise(chain))):
        graph.remove(node, safe=True)


def _constant(node: ir.Node) -> ir.Value:
    return next(value for value in node.inputs if value is not None and value.const_value is not None)


def _array(value: ir.Value) -> float:
    held = value.const_value
    return 0.0 if held is None else float(held.numpy().reshape(()))
