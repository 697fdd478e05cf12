"""The step that sets weights to zero, block by block."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from skipstone.errors import UsageError
from skipstone.exporters.compress.activations import Block, walk
from skipstone.exporters.compress.sparsify import dsnot, open_pruner
from skipstone.exporters.compress.sparsify.gain import gain_of_zeros
from skipstone.exporters.compress.sparsify.masks import Pattern, squared_error
from skipstone.exporters.compress.steps import (
    Details,
    Shape,
    Step,
    Target,
    refuse_after_codes,
    refuse_after_factors,
)
from skipstone.exporters.compress.work import Work

_LAYERS = re.compile(r"(?:(encoder|decoder)\.)?(\d+)(?:-(\d+))?")
_PREFIXES = {"encoder": "encoder.block", "decoder": "decoder.block"}


class Sparsify(Step):
    """Set weights of the blocks' linear layers to zero; embedding and LM head stay.

    Attributes:
        method: a pruner's name (`skipstone.exporters.compress.sparsify`).
        sparsity: the share of weights that goes, or
        pattern: N:M, say `2:4`: of every M weights that follow each other in a row, N stay.
        refine: `dsnot`: swap weights in and out of the mask afterwards, and let `sparsegpt` fit the rest anew.
        layers: another share or pattern for some layers, by number: `{"0-2": "0.3", "11": "2:4"}`; of an
            encoder-decoder `encoder.0-2`, and the decoder's without a name in front.
    """

    kind: ClassVar[str] = "sparsify"
    method: str = "wanda"
    sparsity: float | None = None
    pattern: str | None = None
    refine: Literal["dsnot"] | None = None
    layers: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _says_how_much(self) -> Self:
        open_pruner(self.method)
        for text in (self._default, *self.layers.values()):
            Pattern.parse(text)
        for key in self.layers:
            if _LAYERS.fullmatch(key) is None:
                raise ValueError(f"layers: {key!r} names no layers; say 3, 0-2 or encoder.0-2")
        if self.sparsity is not None and self.pattern is not None:
            raise ValueError("either sparsity or pattern was expected")
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether weights are judged by their inputs."""
        return self.method != "magnitude" or self.refine is not None

    @property
    def _default(self) -> str:
        return self.pattern or str(0.5 if self.sparsity is None else self.sparsity)

    def check(self, shape: Shape, target: Target) -> Shape:
        refuse_after_codes(shape, self.kind)
        refuse_after_factors(shape, self.kind)
        self._patterns(shape.layers, shape.encoder_layers)
        for text in (self._default, *self.layers.values()):
            group = Pattern.parse(text).group or 1
            for name, width in (("hidden_size", shape.hidden_size), ("ffn_size", shape.ffn_size)):
                if width % group:
                    raise UsageError(
                        f"sparsify: {name} is {width}, which {text} does not divide",
                        hint="give a share of weights instead, such as sparsity=0.5",
                    )
        return shape

    def apply(self, model: nn.Module, work: Work) -> Details:
        whole: Any = model
        config = whole.config
        encoder = config.num_layers if config.is_encoder_decoder else 0
        decoder = config.num_decoder_layers if config.is_encoder_decoder else config.num_hidden_layers
        patterns = self._patterns(decoder, encoder)
        removed, errors = {}, {}
        for done, block in enumerate(walk(model, *self._texts(work))):
            work.progress(f"sparsify {block.name}", done, decoder + encoder)
            removed[block.name], errors[block.name] = self._prune_block(block, patterns[block.name])
        gain = gain_of_zeros(Pattern.parse(self._default), work.target.format)
        return {"removed": removed, "relative_error": errors, "gain": gain}

    def _prune_block(self, block: Block, pattern: Pattern) -> tuple[float, float]:
        """Prune a block's linear layers in place: the share of weights removed, and their outputs' mean squared error in
        parts of the outputs' mean square.
        """
        removed, weights, lost, whole = 0, 0, 0.0, 0.0
        for name, linear in block.linears.items():
            moment, weight = block.inputs[name].second_moment, linear.weight.detach()
            pattern.check_fits(weight, f"{block.name}.{name}")
            new, kept = self.pruned(weight, moment, pattern)
            removed, weights = removed + int((~kept).sum()), weights + kept.numel()
            lost += float(squared_error((new - weight).double(), moment).sum())
            whole += float(squared_error(weight.double(), moment).sum())
            weight.copy_(new)
        return removed / weights, lost / max(whole, 1e-30)

    def pruned(self, weight: Tensor, moment: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """One weight pruned and refined as the step says: see `Pruner`."""
        prune = open_pruner(self.method)
        new, kept = prune(weight, moment, pattern)
        if self.refine is None:
            return new, kept
        return prune(weight, moment, pattern, dsnot.refine(weight, moment, kept, pattern))

    def _texts(self, work: Work) -> tuple[Sequence[Tensor], Sequence[Tensor] | None]:
        """What `walk` reads: the calibration text, or a single token where inputs do not count."""
        if self.needs_calibration:
            return work.calibration.windows, work.calibration.sources
        one = (torch.zeros(1, dtype=torch.int64),)
        return one, one

    def _patterns(self, layers: int, encoder_layers: int) -> dict[str, Pattern]:
        """By block, as `walk` names it, what goes.

        Raises:
            UsageError: layers that the model lacks.
        """
        stacks = {"decoder": layers} | ({"encoder": encoder_layers} if encoder_layers else {})
        prefixes = _PREFIXES if encoder_layers else {"decoder": "model.layers"}
        found = {
            f"{prefixes[side]}.{index}": Pattern.parse(self._default)
            for side, count in stacks.items()
            for index in range(count)
        }
        for key, text in self.layers.items():
            match = _LAYERS.fullmatch(key)
            if match is None:
                continue  # refused when the step was made
            side, first, last = match[1] or "decoder", int(match[2]), int(match[3] or match[2])
            if side not in stacks or not first <= last < stacks[side]:
                raise UsageError(
                    f"sparsify: layers {key!r}: the model has no such layers",
                    hint=f"they are numbered {', '.join(f'{s} 0 to {n - 1}' for s, n in stacks.items())}",
                )
            found |= {f"{prefixes[side]}.{index}": Pattern.parse(text) for index in range(first, last + 1)}
        return found
