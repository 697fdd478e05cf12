"""What a step of compression is, and which there are: a registry from kind to class, imported when used.

>>> step = step_class("drop_layers")(count=3, by="cosine")
>>> shape = step.check(shape, Target(format="gguf"))
>>> details = step.apply(model, work)
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, cast

from skipstone.bundle.record import Record
from skipstone.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from skipstone.exporters.compress.work import Work

Details: TypeAlias = Mapping[str, Any]

STEPS = {
    "drop_layers": "skipstone.exporters.compress.depth:DropLayers",
    "low_rank": "skipstone.exporters.compress.low_rank.step:LowRank",
    "prune_heads": "skipstone.exporters.compress.width:PruneHeads",
    "prune_width": "skipstone.exporters.compress.width:PruneWidth",
    "quantize": "skipstone.exporters.compress.quantize.step:Quantize",
    "recover": "skipstone.exporters.compress.recover.step:Recover",
    "search": "skipstone.exporters.compress.search.step:Search",
    "sparsify": "skipstone.exporters.compress.sparsify.step:Sparsify",
}


@dataclass(frozen=True)
class Target:
    """What the compressed model is for, as far as that is known; None where it is not.

    Attributes:
        format: a name in `skipstone.exporters.formats.FORMATS`.
        scheme: the quantisation that it will be exported in.
        device: name of a device profile.
    """

    format: str | None = None
    scheme: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class Shape:
    """A model without its weights, as far as steps and formats ask; what a step will make of it is known beforehand.

    Attributes:
        architecture: transformers' class.
        layers: of the decoder.
        encoder_layers: of an encoder-decoder's encoder; 0 for a decoder alone.
        hidden_size: channels.
        heads: query heads of every attention module.
        key_value_heads: of every attention module; a T5's are its heads.
        head_size: channels of a head.
        ffn_size: neurons of every feed-forward network.
        period: one layer in so many differs from the others, which a GGUF knows by place alone; 1: all are alike.
        quantized: the storage layout (or several, joined by +) that codes were fixed in; None: none were. Weights that
            have codes must not change any more.
        factored: whether linear layers are pairs of narrow ones (`skipstone.exporters.factors`).
    """

    architecture: str
    layers: int
    encoder_layers: int
    hidden_size: int
    heads: int
    key_value_heads: int
    head_size: int
    ffn_size: int
    period: int = 1
    quantized: str | None = None
    factored: bool = False

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether an encoder reads a source."""
        return self.encoder_layers > 0


class Step(Record):
    """One step: a frozen record of its options, each a key in a recipe and in `--compress kind:key=value`.

    `needs_calibration` says whether `apply` reads the calibration text: a recipe without one is then refused. A step
    for which that depends on an option overrides it as a property.
    """

    kind: ClassVar[str]

    @property
    def needs_calibration(self) -> bool:
        """Whether `apply` reads the calibration text."""
        return False

    @property
    def reads(self) -> tuple[Path, ...]:
        """Files that options name: what is kept of the step goes by their content too."""
        return ()

    @abstractmethod
    def check(self, shape: Shape, target: Target) -> Shape:
        """Refuse, before any work, what cannot be done or what the target cannot carry.

        Args:
            shape: the model's, after the steps before this one.
            target: what it is for.

        Returns:
            The shape after this step.

        Raises:
            UsageError: naming what cannot be, and the alternative.
        """

    @abstractmethod
    def apply(self, model: nn.Module, work: Work) -> Details:
        """Change a model in place.

        Args:
            model: in float32, from `skipstone.exporters.checkpoint.load_eager`: a decoder or a T5. Afterwards
                `save_pretrained` and `from_pretrained` must give the same model, so its config changes along.
            work: calibration, codes, exits and the like; what a step changes of these, it changes there.

        Returns:
            What the step chose, for the record: anything that JSON holds.

        Raises:
            SkipstoneError: it cannot be done after all; the model is then thrown away.
        """


def step_class(kind: str) -> type[Step]:
    """The class of a kind of step.

    Raises:
        UsageError: there is none of that kind; lists those there are.
    """
    target = STEPS.get(kind)
    if target is None:
        raise UsageError(f"step {kind!r} is not known", hint=f"one of {', '.join(STEPS)}")
    module, name = target.split(":")
    return cast("type[Step]", getattr(importlib.import_module(module), name))


def refuse_after_codes(shape: Shape, kind: str) -> None:
    """Refuse a step that changes weights whose codes are fixed.

    Raises:
        UsageError: they are.
    """
    if shape.quantized is not None:
        raise UsageError(
            f"{kind}: the weights are quantised already ({shape.quantized}), and this step would change them",
            hint="put the step before quantize",
        )


def refuse_after_factors(shape: Shape, kind: str) -> None:
    """Refuse a step that knows whole matrices alone where some are pairs.

    Raises:
        UsageError: some are.
    """
    if shape.factored:
        raise UsageError(
            f"{kind}: linear layers are pairs of narrow ones already, which this step cannot change",
            hint="put the step before low_rank; to quantise, leave that to the export, which rounds both matrices",
        )
