"""The step that fixes the codes of a model's weights, for the exporter of one format to carry exactly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from skipstone.errors import UsageError
from skipstone.exporters.compress.activations import Block, Inputs, stacks_of, walk
from skipstone.exporters.compress.quantize import needs_inputs, open_quantizer
from skipstone.exporters.compress.quantize.folds import apply_fold, folds_of
from skipstone.exporters.compress.quantize.grid import Grid, Parts, grid_of, stored
from skipstone.exporters.compress.quantize.plan import (
    TABLES,
    Place,
    format_of,
    layouts,
    scheme_of_bits,
    table_names,
)
from skipstone.exporters.compress.quantize.rank import Ranking, lowest
from skipstone.exporters.compress.steps import (
    Details,
    Shape,
    Step,
    Target,
    refuse_after_codes,
    refuse_after_factors,
)
from skipstone.exporters.compress.work import Work

_FOLDS = ("awq", "smoothquant")


class Quantize(Step):
    """Fix the codes of the blocks' linear layers, of the embedding and of the LM head.

    The weights become what their codes stand for, so that the model can be measured as it will be. The embedding, and
    the head, are rounded to the nearest code, whatever the method.

    Attributes:
        scheme: what the checkpoint is to be exported in, of GGUF (`q4_k_m`) or ExecuTorch (`8da4w`); or
        bits: the usual scheme of so many bits for the target's format.
        method: how codes are chosen: a quantiser's name (`skipstone.exporters.compress.quantize`), or `awq` or
            `smoothquant`, which stand for that fold before rounding.
        fold: `awq` or `smoothquant`: scale channels before codes are chosen.
        mix: by place (`head`, `0-2`, `down_proj`, `0-2.down_proj`), another layout, say `q6_k`; of ExecuTorch another
            scheme.
        lower: layout, or ExecuTorch's scheme, of the layers that count least.
        lowered: how many layers get it.
        by: what says how much a layer counts: `cosine`, `outliers` or `sensitivity` (`rank`).
    """

    kind: ClassVar[str] = "quantize"
    scheme: str | None = None
    bits: int | None = None
    method: str = "rtn"
    fold: Literal["awq", "smoothquant"] | None = None
    mix: dict[str, str] = Field(default_factory=dict)
    lower: str | None = None
    lowered: int = 0
    by: Ranking = "cosine"

    @model_validator(mode="before")
    @classmethod
    def _named_after_its_fold(cls, given: Any) -> Any:
        """`method=awq` is `fold=awq` with rounding to the nearest code."""
        if isinstance(given, dict) and given.get("method") in _FOLDS and given.get("fold") is None:
            return {**given, "method": "rtn", "fold": given["method"]}
        return given

    @model_validator(mode="after")
    def _says_what(self) -> Self:
        open_quantizer(self.method)
        if (self.scheme is None) == (self.bits is None):
            raise ValueError("either scheme or bits was expected")
        if self.scheme is not None:
            format_of(self.scheme)
        for text in self.mix:
            Place.parse(text)
        if (self.lower is None) != (self.lowered == 0):
            raise ValueError("lower and lowered go together: which layout, and how many layers")
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether codes go by the inputs of layers, or layers are ranked by what they do."""
        ranked = self.lower is not None and self.by != "outliers"
        return needs_inputs(self.method) or self.fold is not None or ranked

    def check(self, shape: Shape, target: Target) -> Shape:
        refuse_after_codes(shape, self.kind)
        refuse_after_factors(shape, self.kind)
        scheme = self._scheme(target)
        format = format_of(scheme)
        if target.format not in (None, format):
            raise UsageError(
                f"quantize: {scheme} is a scheme of --format {format}, the target is {target.format}",
                hint="leave this step out: the exporter rounds to the nearest code by itself"
                if target.format == "onnx"
                else f"name a scheme of {target.format}, or bits",
            )
        if target.scheme not in (None, scheme):
            raise UsageError(
                f"quantize: codes for {scheme}, but --quantize {target.scheme}",
                hint=f"pass --quantize {scheme}, or leave it out",
            )
        if self.lowered >= shape.layers:
            raise UsageError(
                f"quantize: lowered={self.lowered}: the model has {shape.layers} layers",
                hint="choose a smaller scheme for all of them",
            )
        if scheme == "int8" and (self.fold is None or self.method != "rtn"):
            raise UsageError(
                "quantize: int8's codes are chosen while the program is lowered",
                hint="fold=smoothquant prepares the weights for it; 8da8w takes any method",
            )
        return replace(shape, quantized=scheme)

    def apply(self, model: nn.Module, work: Work) -> Details:
        scheme = self._scheme(work.target)
        mix = dict(self.mix)
        if self.lower is not None:
            chosen = lowest(
                model, work, self.by, self.lowered, lambda layer: self._lowered(model, scheme, layer)
            )
            mix = {str(layer): self.lower for layer in chosen} | mix
        layout = layouts(model, scheme, mix)
        weights, errors = dict(model.named_parameters()), {}
        total = sum(len(stack.blocks) for stack in stacks_of(model))
        for done, block in enumerate(walk(model, *self._texts(work))):
            work.progress(f"quantize {block.name}", done, total)
            grids = {
                name: grid_of(layout[full])
                for name in block.linears
                if (full := f"{block.name}.{name}.weight") in layout
            }
            inputs = self._folded(block, grids)
            errors[block.name] = self._fix_block(block, grids, inputs, work)
        for name in table_names(model).values():
            if name in layout:
                _fix(name, weights[name], grid_of(layout[name]).fit(weights[name], None), layout, work)
        work.scheme = scheme
        if format_of(scheme) == "executorch":
            work.tables = {table: given for table, given in mix.items() if table in TABLES}
        kinds = Counter(layout.values())
        return {"scheme": scheme, "mix": mix, "layouts": dict(kinds), "relative_error": errors}

    def _scheme(self, target: Target) -> str:
        return self.scheme or scheme_of_bits(self.bits or 0, target.format)

    def _lowered(self, model: nn.Module, scheme: str, layer: int) -> dict[str, Grid]:
        """By weight, the layouts that lowering one layer gives it."""
        found = layouts(model, scheme, {str(layer): str(self.lower)})
        prefix = f"{stacks_of(model)[-1].name}.{layer}."
        return {name: grid_of(layout) for name, layout in found.items() if name.startswith(prefix)}

    def _folded(self, block: Block, grids: Mapping[str, Grid]) -> dict[str, Inputs]:
        """Scale channels, if that was asked for; the layers' inputs afterwards."""
        inputs = dict(block.inputs)
        if self.fold is None:
            return inputs
        find = import_module(f"{__package__}.{self.fold}").find_scales
        for fold in folds_of(block):
            weights = [block.linears[name].weight.detach() for name in fold.takers]
            scales = find(weights, inputs[fold.takers[0]], [grids.get(name) for name in fold.takers], fold)
            inputs = apply_fold(block, fold, scales, inputs)
        return inputs

    def _fix_block(
        self, block: Block, grids: Mapping[str, Grid], inputs: Mapping[str, Inputs], work: Work
    ) -> float:
        """Fix the codes of a block: the outputs' mean squared error in parts of their mean square."""
        quantize, lost, whole = open_quantizer(self.method), 0.0, 0.0
        layout = {f"{block.name}.{name}.weight": grid.name for name, grid in grids.items()}
        for name, grid in grids.items():
            weight, moment = block.linears[name].weight, inputs[name].second_moment
            before = weight.detach().clone()
            parts = quantize(before, inputs[name], grid)
            _fix(f"{block.name}.{name}.weight", weight, parts, layout, work)
            error, given = (weight.detach() - before).double(), before.double()
            lost += float(((error @ moment) * error).sum())
            whole += float(((given @ moment) * given).sum())
        return lost / max(whole, 1e-30)

    def _texts(self, work: Work) -> tuple[Sequence[Tensor], Sequence[Tensor] | None]:
        """What `walk` reads: the calibration text, or a single token where inputs do not count."""
        if needs_inputs(self.method) or self.fold is not None:
            return work.calibration.windows, work.calibration.sources
        one = (torch.zeros(1, dtype=torch.int64),)
        return one, one


@torch.no_grad()
def _fix(name: str, weight: Tensor, parts: Parts, layout: Mapping[str, str], work: Work) -> None:
    """Keep a weight's codes, and make it what they stand for."""
    grid = grid_of(layout[name])
    weight.copy_(grid.levels(parts).values(grid.codes(parts)))
    work.codes[name] = stored(grid, parts)
