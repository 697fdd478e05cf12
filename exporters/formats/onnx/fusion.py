"""Rewriting a graph into forms that ONNX Runtime computes in one step."""

from __future__ import annotations

import onnx_ir as ir


def divide_by_roots(graph: ir.Model) -> None:
    """X · (1 / √v) becomes x / √v, in place: so written, ONNX Runtime takes a norm's seven operators together."""
    for node in list(graph.graph):
        if node.op_type == "Reciprocal" and all(use.node.op_type == "Mul" for use in node.outputs[0].uses()):
            for use in list(node.outputs[0].uses()):
                _divide(graph, use.node, use.idx, node.inputs[0])
            graph.graph.remove(node, safe=True)


def _divide(graph: ir.Model, product: ir.Node, index: int, root: ir.Value | None) -> None:
    """Put a division in a product's place; the product's factor `index` is the inverse of `root`."""
    division = ir.node("Div", [product.inputs[1 - index], root], name=product.name)
    made, before = division.outputs[0], product.outputs[0]
    made.shape, made.type, made.name = before.shape, before.type, before.name
    ir.convenience.replace_nodes_and_values(graph.graph, product, [product], [division], [before], [made])
