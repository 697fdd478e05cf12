"""Quantisation schemes of Core ML packages; activations, norms, K and V are float16 in all of them.

fp16    float16 weights
8w      int8 weights of linear layers, a scale per output
4w      int4 weights of linear layers in blocks of 32 inputs, a scale each
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from skipstone.exporters.formats.scheme_names import find_scheme

BLOCK = 32


@dataclass(frozen=True)
class Scheme:
    """A scheme.

    Attributes:
        name: what `--quantize` is given.
        bits: of a weight.
        min_agreement: share of positions at which the best token must be the float32 model's.
    """

    name: str
    bits: int
    min_agreement: float

    @property
    def quantises(self) -> bool:
        """Whether weights are integers."""
        return self.bits < 16


SCHEMES = {
    scheme.name: scheme for scheme in (Scheme("4w", 4, 0.5), Scheme("8w", 8, 0.9), Scheme("fp16", 16, 0.95))
}


def scheme_of(name: str) -> Scheme:
    """The scheme of that name.

    Raises:
        UsageError: no such scheme; lists them.
    """
    return find_scheme(name, SCHEMES, format="coreml", docs="docs/coreml.md")


def quantize(model: Any, scheme: Scheme) -> Any:
    """A Core ML model with the weights of its linear layers as integers; the same model for fp16."""
    if not scheme.quantises:
        return model
    from coremltools.optimize import coreml as optimize

    blocks = {"granularity": "per_block", "block_size": BLOCK} if scheme.bits == 4 else {}
    linear = optimize.OpLinearQuantizerConfig(
        mode="linear_symmetric", dtype=f"int{scheme.bits}", weight_threshold=0, **blocks
    )
    return optimize.linear_quantize_weights(
        model, optimize.OptimizationConfig(op_type_configs={"linear": linear})
    )
