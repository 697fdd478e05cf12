"""Quantisation schemes of Ethos-U programs; the NPU has integers alone.

a16w8    activations, K and V in 16 bits, weights in 8 with a scale per output
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from skipstone.exporters.formats.scheme_names import find_scheme

_LEAST_STEP = 2.0**-30


@dataclass(frozen=True)
class Scheme:
    """A scheme.

    Attributes:
        name: what `--quantize` is given.
        min_agreement: share of positions at which the best token must be the float32 model's.
    """

    name: str
    min_agreement: float

    def configuration(self) -> Any:
        """As ExecuTorch's quantiser for Ethos-U takes it, but with steps as small as small values need.

        By itself it takes no step below 2^-12, which leaves a norm a few steps for its variance.
        """
        from executorch.backends.arm import quantizer
        from torchao.quantization.pt2e import MinMaxObserver

        found = quantizer.get_symmetric_a16w8_quantization_config(is_per_channel=True)
        values = replace(
            found.input_activation, observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=_LEAST_STEP)
        )
        return replace(found, input_activation=values, output_activation=values)


SCHEMES = {scheme.name: scheme for scheme in (Scheme("a16w8", 0.8),)}


def scheme_of(name: str) -> Scheme:
    """The scheme of that name.

    Raises:
        UsageError: no such scheme; lists them.
    """
    return find_scheme(name, SCHEMES, format="ethosu", docs="docs/ethos.md")
