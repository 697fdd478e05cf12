"""Which weight of a model is stored in which layout: what a scheme says, and what is to differ from it.

A scheme is what `--quantize` takes, and says what it is for: those of GGUF (`q4_k_m`), or those of ExecuTorch (`8da4w`).
What is to differ is named by place: `embed`, `head`, layers (`3`, `0-2`, of an encoder-decoder `encoder.0-2`), a
matrix in every layer (`down_proj`) or in some (`0-2.down_proj`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from skipstone.errors import UsageError
from skipstone.exporters.compress.activations import stacks_of
from skipstone.exporters.compress.quantize.gguf_layout import gguf_types
from skipstone.exporters.compress.quantize.grid import grid_of
from skipstone.exporters.formats.executorch.schemes import SCHEMES as EXECUTORCH
from skipstone.exporters.formats.executorch.schemes import Scheme as IntScheme
from skipstone.exporters.formats.gguf.schemes import FLOATS
from skipstone.exporters.formats.gguf.schemes import SCHEMES as GGUF

_OF_BITS = {
    "gguf": {8: "q8_0", 6: "q6_k", 5: "q5_k_m", 4: "q4_k_m", 3: "q3_k_m", 2: "q2_k"},
    "executorch": {8: "8da8w", 4: "8da4w"},
}
_PLACE = re.compile(r"(?:(?:(encoder|decoder)\.)?(\d+)(?:-(\d+))?)?(?:(?:^|\.)([a-zA-Z_]\w*))?")
TABLES = ("embed", "head")


@dataclass(frozen=True)
class Place:
    """Some weights of a model.

    Attributes:
        text: as it was given.
        stack: `encoder` or `decoder`; None: the decoder, or for a matrix in every layer both.
        layers: numbers; None: all.
        matrix: name of a linear layer; None: all of a layer's.
    """

    text: str
    stack: str | None
    layers: range | None
    matrix: str | None

    @classmethod
    def parse(cls, text: str, option: str = "quantize: mix") -> Place:
        """Read a place, which an option was given.

        Raises:
            UsageError: it is none.
        """
        match = _PLACE.fullmatch(text)
        if match is None or not text:
            raise UsageError(
                f"{option}: {text!r} names no place",
                hint="say embed, head, 3, 0-2, encoder.0-2, down_proj or 0-2.down_proj",
            )
        stack, first, last, matrix = match.groups()
        layers = None if first is None else range(int(first), int(last or first) + 1)
        return cls(text, stack or ("decoder" if layers is not None else None), layers, matrix)

    def holds(self, stack: str, layer: int, matrix: str) -> bool:
        """Whether it names that matrix."""
        return (
            self.text not in TABLES
            and (self.stack is None or stack == self.stack)
            and (self.layers is None or layer in self.layers)
            and (self.matrix is None or matrix.rsplit(".", 1)[-1] == self.matrix)
        )


def format_of(scheme: str) -> str:
    """The format that a scheme is for.

    Raises:
        UsageError: no scheme that codes can be chosen for; lists them.
    """
    if scheme in GGUF and scheme not in FLOATS:
        return "gguf"
    if scheme in EXECUTORCH and EXECUTORCH[scheme].weight in ("int4", "int8"):
        return "executorch"
    known = [
        *(name for name in GGUF if name not in FLOATS),
        *(name for name, one in EXECUTORCH.items() if one.weight in ("int4", "int8")),
    ]
    raise UsageError(f"quantize: scheme {scheme!r} has no codes to choose", hint=f"one of {', '.join(known)}")


def scheme_of_bits(bits: int, format: str | None) -> str:
    """The usual scheme of so many bits.

    Raises:
        UsageError: the format has none.
    """
    known = _OF_BITS.get(format or "gguf", {})
    if bits not in known:
        raise UsageError(
            f"quantize: bits={bits}: --format {format or 'gguf'} has no scheme of that size",
            hint=f"it has {', '.join(map(str, known))}" if known else "name a scheme of gguf or executorch",
        )
    return known[bits]


def layouts(model: nn.Module, scheme: str, mix: Mapping[str, str]) -> dict[str, str]:
    """By the name of a weight, the storage layout in which its codes are to be chosen; {} where a scheme chooses codes
    only while it is lowered (`int8`).

    Args:
        model: a decoder or a T5.
        scheme: see above.
        mix: by place, another layout; for ExecuTorch another scheme. Later places go before earlier ones.

    Raises:
        UsageError: a place or layout that there is not, or columns that do not fit it.
        CheckpointError: GGUF cannot hold the model.
    """
    found = _gguf(model, scheme) if format_of(scheme) == "gguf" else _integers(model, EXECUTORCH[scheme])
    tables = table_names(model)
    for text, given in mix.items():
        place = Place.parse(text)
        if text in TABLES and len(tables) == 1 and format_of(scheme) == "executorch":
            # A program keeps a shared table twice, which codes of one layout could not serve.
            _layout_in_mix(scheme, given, table=text == "embed")
            found.pop(tables["embed"], None)
            continue
        names = [tables[text]] if text in tables else _named(model, place)
        if not names:
            raise UsageError(f"quantize: mix: {text}: the model has no such weights", hint="see its layers")
        for name in names:
            layout = _layout_in_mix(scheme, given, table=text == "embed")
            if layout is None:
                found.pop(name, None)
            else:
                found[name] = layout
    _check_layouts(model, found)
    return found


def table_names(model: Any) -> dict[str, str]:
    """The weights of the embedding (`embed`) and of the LM head (`head`), by their names among the parameters; of two
    that share one, the embedding alone.
    """
    names = {id(weight): name for name, weight in model.named_parameters()}
    embed, head = (names[id(part.weight)] for part in (model.get_input_embeddings(), model.lm_head))
    return {"embed": embed} if embed == head else {"embed": embed, "head": head}


def linear_names(model: Any) -> dict[tuple[str, int, str], str]:
    """By stack, layer and name within it, the names of the weights of all linear layers of all blocks."""
    return {
        (_side(stack.name), index, part): f"{stack.name}.{index}.{part}.weight"
        for stack in stacks_of(model)
        for index, block in enumerate(stack.blocks)
        for part, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }


def _side(stack: str) -> str:
    return "encoder" if stack.startswith("encoder") else "decoder"


def _named(model: nn.Module, place: Place) -> list[str]:
    return [name for key, name in linear_names(model).items() if place.holds(*key)]


def _gguf(model: nn.Module, scheme: str) -> dict[str, str]:
    found = gguf_types(model, GGUF[scheme])
    # In a T5's table of shared embeddings, GGUF and the model go by different names.
    names = {
        name: canonical
        for canonical, weight in model.named_parameters()
        for name, other in model.named_parameters(remove_duplicate=False)
        if other is weight
    }
    return {names.get(name, name): layout for name, layout in found.items()}


def _integers(model: nn.Module, scheme: IntScheme) -> dict[str, str]:
    if scheme.activations == "static":
        return {}
    found = dict.fromkeys(linear_names(model).values(), _layout_of(scheme))
    tables = table_names(model)
    # An embedding is rounded in groups even where the head, which may be the same table, is rounded by channel.
    if len(tables) == 2 or not scheme.per_channel:
        found[tables["embed"]] = _layout_of(scheme, table=True)
    if len(tables) == 2:
        found[tables["head"]] = _layout_of(scheme)
    return found


def _layout_of(scheme: IntScheme, *, table: bool = False) -> str:
    return f"{scheme.weight}_{'channel' if scheme.per_channel and not table else 'g32'}"


def _layout_in_mix(scheme: str, given: str, *, table: bool) -> str | None:
    """The layout that a mix names; None: float."""
    if format_of(scheme) == "gguf":
        return grid_of(given).name
    found = EXECUTORCH.get(given)
    able = [one.name for one in EXECUTORCH.values() if one.mixes and _alike(one, EXECUTORCH[scheme])]
    if found is None or given not in able or not EXECUTORCH[scheme].mixes:
        raise UsageError(
            f"quantize: mix: {given} cannot be mixed with {scheme}", hint=f"these can: {', '.join(able)}"
        )
    return None if found.weight is None else _layout_of(found, table=table)


def _alike(one: IntScheme, other: IntScheme) -> bool:
    """Whether weights in one layout mean the same in both: activations are rounded in both or in neither."""
    return None in (one.weight, other.weight) or one.activations == other.activations


def _check_layouts(model: nn.Module, found: Mapping[str, str]) -> None:
    weights = dict(model.named_parameters())
    for name, layout in found.items():
        try:
            grid = grid_of(layout)
        except UsageError as error:
            raise UsageError(
                f"quantize: {name} would be stored as {layout}, whose codes cannot be chosen",
                hint="choose another scheme, or another layout for it with mix",
            ) from error
        block, columns = grid.block, weights[name].shape[1]
        if columns % block:
            raise UsageError(
                f"quantize: {name} has {columns} columns, {layout} needs a multiple of {block}",
                hint="choose q8_0 or q4_0 for it, with blocks of 32" if block > 32 else "leave it in float",
            )
