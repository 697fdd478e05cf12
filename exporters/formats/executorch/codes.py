"""Codes of a compressed checkpoint → the weights of a cut model, as they were chosen.

Layers are quantised as the scheme says, by torchao, and then given codes and scales in place of torchao's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from skipstone.errors import CheckpointError
from skipstone.exporters.compress.quantize.int_grid import GRIDS, codes_and_scales
from skipstone.exporters.compress.work import Codes, FixedCodes
from skipstone.exporters.formats.executorch.schemes import SCHEMES, Mix, Scheme, scheme_of

# A matrix of a layer: its stack, the layer's number, its name in there.
_MATRIX = re.compile(r"(model\.layers|encoder\.block|decoder\.block)\.(\d+)\.(.+)\.weight")
_PART = {"model.layers": "layer", "decoder.block": "layer", "encoder.block": "encoder_layer"}
_NO_MATRIX = re.compile(r"norm|relative_attention_bias")
_TABLES = ("model.embed_tokens.weight", "shared.weight")
_HEADS = ("lm_head.weight", *_TABLES)


def mix_of_codes(codes: FixedCodes, weights: Iterable[str]) -> Mix:
    """What the parts of a model are quantised to; where a layer's matrices differ, each has a name of its own, say
    `layer_3.mlp.down_proj`. Matrices without codes stay in float32.

    Args:
        codes: of the model.
        weights: names of all its weights.
    """
    scheme = scheme_of(codes.scheme)
    by_part: dict[str, dict[str, Scheme]] = {}
    for name in sorted(weights):
        match = _MATRIX.fullmatch(name)
        if match is not None and not _NO_MATRIX.search(name):
            part = f"{_PART[match[1]]}_{match[2]}"
            by_part.setdefault(part, {})[match[3]] = _scheme_in(codes.weights.get(name), scheme)
    exceptions = {part: scheme_of(name) for part, name in codes.tables.items()}
    for part, matrices in by_part.items():
        if len(set(matrices.values())) == 1:
            exceptions[part] = next(iter(matrices.values()))
        else:
            exceptions |= {f"{part}.{matrix}": found for matrix, found in matrices.items()}
    return Mix(scheme, {part: found for part, found in exceptions.items() if found != scheme})


def put_codes(part: str, module: nn.Module, codes: FixedCodes, rows: Tensor | None = None) -> None:
    """Give a quantised part of a model its codes, in place.

    Args:
        part: its name, as a mix knows it.
        module: the part.
        codes: of the model.
        rows: of a head over a part of the vocabulary, its token ids.

    Raises:
        CheckpointError: codes of another shape or layout than the part's.
    """
    for matrix, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            name = _weight_name(part, matrix, codes.weights)
            if name is not None:
                _put(name, layer, codes.weights[name], rows)


def put_codes_in_parts(
    parts: Iterable[tuple[str, nn.Module]], codes: FixedCodes, draft_tokens: NDArray[np.int32] | None
) -> None:
    """Give a cut and quantised model its codes, in place.

    Args:
        parts: with their names; the second `head` is the draft head.
        codes: of the model.
        draft_tokens: token ids of the draft head's rows; None: there is none.

    Raises:
        CheckpointError: as `put_codes`.
    """
    heads = iter((None, draft_tokens))
    for part, module in parts:
        tokens = next(heads) if part == "head" else None
        rows = None if tokens is None else torch.from_numpy(tokens.astype(np.int64))
        put_codes(part, module, codes, rows)


def _scheme_in(codes: Codes | None, base: Scheme) -> Scheme:
    """The scheme of a matrix that has these codes, activations being treated as the base scheme treats them."""
    if codes is None:
        return SCHEMES["none"]
    grid = GRIDS.get(codes.grid)
    if grid is not None:
        stored = (f"int{grid.width}", grid.group is None, base.activations)
        for scheme in SCHEMES.values():
            if (scheme.weight, scheme.per_channel, scheme.activations) == stored:
                return scheme
    raise CheckpointError(
        f"codes in the layout {codes.grid} fit no scheme that {base.name} can be mixed with",
        hint="compress the checkpoint again",
    )


def _weight_name(part: str, matrix: str, weights: Mapping[str, Codes]) -> str | None:
    """The name of the codes of a matrix in a part; None: it has none."""
    known: tuple[str, ...]
    if part == "embed":
        known = _TABLES
    elif part == "head":
        known = _HEADS
    else:
        kind, _, number = part.rpartition("_")
        known = tuple(f"{stack}.{number}.{matrix}.weight" for stack, named in _PART.items() if named == kind)
    return next((name for name in known if name in weights), None)


def _put(name: str, layer: nn.Linear | nn.Embedding, codes: Codes, rows: Tensor | None) -> None:
    weight: Any = layer.weight
    given = codes_and_scales(codes.parts)
    chosen = given if rows is None else tuple(part[rows] for part in given)
    held = (weight.qdata, weight.scale) if hasattr(weight, "qdata") else ()
    if [part.shape for part in chosen] != [part.shape for part in held]:
        raise CheckpointError(
            f"{name}: codes in the layout {codes.grid} do not fit what the scheme makes of it",
            hint="compress the checkpoint again",
        )
    with torch.no_grad():
        for target, source in zip(held, chosen, strict=True):
            target.copy_(source)
