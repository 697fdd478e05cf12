"""The step that puts two narrow linear layers in the place of one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from skipstone.errors import UsageError
from skipstone.exporters.compress.activations import stacks_of, walk
from skipstone.exporters.compress.low_rank.allot import Choice, allot, choices
from skipstone.exporters.compress.low_rank.factorise import directions
from skipstone.exporters.compress.low_rank.gain import carries_pairs, gain_of_pairs
from skipstone.exporters.compress.low_rank.sensitivity import sensitivities
from skipstone.exporters.compress.quantize.plan import TABLES, Place, linear_names
from skipstone.exporters.compress.steps import (
    Details,
    Shape,
    Step,
    Target,
    refuse_after_codes,
    refuse_after_factors,
)
from skipstone.exporters.compress.work import Work
from skipstone.exporters.factors import FactoredLinear, put_in_place

_BUDGET = 0.8


class LowRank(Step):
    """Factor the blocks' linear layers; embedding and LM head stay.

    Ranks go where they keep the model's predictions best, each block is then fitted to what those before it put out.

    Attributes:
        budget: share of the matrices' weights that is kept, shared out among them by what each costs the model; or
        rank: of every one; those for which that saves nothing stay whole.
        places: which matrices, named as in `quantize`'s `mix`: layers (`0-2`), a matrix (`down_proj`), or one in some
            layers (`0-2.down_proj`); none: all.
        multiple: under a budget, ranks come in multiples of it; quantised formats keep 32 weights together.
    """

    kind: ClassVar[str] = "low_rank"
    budget: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    rank: Annotated[int, Field(gt=0)] | None = None
    places: tuple[str, ...] = ()
    multiple: Annotated[int, Field(gt=0)] = 32

    @model_validator(mode="after")
    def _says_how_much(self) -> Self:
        if self.budget is not None and self.rank is not None:
            raise ValueError("either budget or rank was expected")
        for text in self.places:
            if text in TABLES:
                raise ValueError(f"places: {text} is no linear layer of a block")
            Place.parse(text, "low_rank: places")
        return self

    @property
    def needs_calibration(self) -> bool:
        """Always: what is lost is judged on the matrices' inputs."""
        return True

    def check(self, shape: Shape, target: Target) -> Shape:
        refuse_after_codes(shape, self.kind)
        refuse_after_factors(shape, self.kind)
        return replace(shape, factored=carries_pairs(target.format))

    def apply(self, model: nn.Module, work: Work) -> Details:
        chosen, errors = self._choose(model, work), {}
        for name, linear, moment in self._matrices(model, work, "low_rank"):
            rank = chosen[name].rank
            if rank is None:
                continue
            found = directions(linear.weight.detach(), moment)
            up, down = found.pair(rank)
            lost = found.lost()
            errors[name] = float(lost[rank] / lost[0].clamp(min=1e-30))
            if carries_pairs(work.target.format):
                put_in_place(model, name.removesuffix(".weight"), FactoredLinear(down, up, linear.bias))
            else:
                linear.weight.copy_(up @ down)
        whole = sum(choice.whole for choice in chosen.values())
        return {
            "ranks": {name: choice.rank for name, choice in chosen.items()},
            "kept": sum(choice.weights for choice in chosen.values()) / whole,
            "relative_error": errors,
            "predicted_divergence": sum(choice.lost for choice in chosen.values()),
            "gain": gain_of_pairs(work.target.format),
        }

    def _choose(self, model: nn.Module, work: Work) -> dict[str, Choice]:
        """By weight, its rank, judged on the model as it is."""
        options, linears, lost = {}, {}, {}
        multiple = self.rank or self.multiple
        for name, linear, moment in self._matrices(model, work, "choosing ranks"):
            linears[name], lost[name] = linear, directions(linear.weight.detach(), moment).lost()
        weights = sensitivities(model, linears, work.calibration, work.progress)
        for name, linear in linears.items():
            costs = (weights[name] * lost[name]).tolist()
            options[name] = choices(linear.out_features, linear.in_features, costs, multiple)
        if self.rank is None:
            return allot(options, self.budget or _BUDGET)
        return {
            name: next((choice for choice in found if choice.rank == self.rank), found[-1])
            for name, found in options.items()
        }

    def _matrices(self, model: nn.Module, work: Work, what: str) -> Iterator[tuple[str, nn.Linear, Tensor]]:
        """Every matrix that was named, the name of its weight in front and its inputs' second moment behind.

        What the caller changes in one block shapes the inputs of the next.
        """
        named, places = linear_names(model), [Place.parse(text) for text in self.places]
        wanted = {name for key, name in named.items() if not places or any(p.holds(*key) for p in places)}
        if not wanted:
            raise UsageError(f"low_rank: places={'+'.join(self.places)}: the model has no such linear layers")
        total, text = sum(len(stack.blocks) for stack in stacks_of(model)), work.calibration
        for done, block in enumerate(walk(model, text.windows, text.sources)):
            work.progress(f"{what}, {block.name}", done, total)
            for part, linear in block.linears.items():
                name = f"{block.name}.{part}.weight"
                if name in wanted:
                    yield name, linear, block.inputs[part].second_moment
