"""What was accepted of a model's drafts, as a trace tells it, kept beside the bundle: placements are chosen by it.

    >>> keep_acceptance(bundle, trace)
    >>> kept_acceptance(bundle)
    Acceptance(exits=(0.52, 0.71), text=0.38, source='.../.skipstone/acceptance.json')

It belongs to the model and the texts, not to the machine, so there is one file for a bundle's artefacts. Deleting it is
safe.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from skipstone.bundle import Bundle
from skipstone.devices.kept import artefacts_hash, keep_text, kept_contents
from skipstone.devices.placement import Acceptance
from skipstone.devices.simulator import PLAIN
from skipstone.devices.traces import Run, Trace
from skipstone.errors import UsageError

_NAME = "acceptance.json"
_Share = Annotated[float, Field(ge=0, le=1)]


class _File(BaseModel):
    """The file. `exits` holds a share for each inner exit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["skipstone acceptance"] = "skipstone acceptance"
    schema_version: Literal[1] = 1
    artefacts: str
    exits: tuple[_Share, ...]
    text: _Share
    prompts: int
    prompts_source: str
    recorded: str


def acceptance_of(trace: Trace, source: str) -> Acceptance:
    """What a trace tells; what it does not tell is estimated.

    An exit's share is that of the places where its first choice was the text's next token. That of text drafts is
    counted in the recorded strategy that drafts from text alone and does it best: its accepted drafts, over these and
    its rounds, for each of them ended at a draft that was wrong, or missing.

    Args:
        trace: recorded greedily.
        source: where it comes from, for people.

    Raises:
        UsageError: it does not tell what the exits would have said.
    """
    exits = trace.header.curve.exits
    usual = Acceptance.usual(exits)
    told = [trace.ranks(exit_layer) for exit_layer in exits[:-1]]
    if not all(any(texts) for texts in told):
        raise UsageError(
            f"{source}: the trace does not tell the exits' choices",
            hint="record one with `skipstone bench DIR --trace FILE`, without --do-sample",
        )
    shares = tuple(float((np.concatenate(texts) == 0).mean()) for texts in told)
    texts = [_text_share(trace.of(name)) for name in trace.strategies if name != PLAIN]
    return Acceptance(
        shares, max((share for share in texts if share is not None), default=usual.text), source
    )


def check_model(trace: Trace, bundle: Bundle, source: str) -> None:
    """Refuse a trace of another model.

    Raises:
        UsageError: its name or its exits are not the bundle's.
    """
    manifest = bundle.manifest
    ours = manifest.model.name, (*manifest.exits, manifest.model.num_layers)
    theirs = trace.header.model, trace.header.curve.exits
    if ours != theirs:
        raise UsageError(
            f"{source}: recorded of {_named(*theirs)}, {bundle.path} is {_named(*ours)}",
            hint="record one of this model: `skipstone bench DIR --trace FILE`",
        )


def keep_acceptance(bundle: Bundle, trace: Trace) -> Path | None:
    """Keep what a trace tells in place of what was kept before.

    Returns:
        The file; None where the trace does not tell, or the disk takes none.
    """
    try:
        found = acceptance_of(trace, "")
    except UsageError:
        return None
    header = trace.header
    content = _File(
        artefacts=artefacts_hash(bundle),
        exits=tuple(round(share, 4) for share in found.exits),
        text=round(found.text, 4),
        prompts=header.prompts,
        prompts_source=header.prompts_source,
        recorded=header.started,
    )
    return keep_text(bundle, _NAME, content.model_dump_json(indent=2) + "\n")


def kept_acceptance(bundle: Bundle) -> Acceptance | None:
    """What was kept; None where nothing was, or what was is damaged, newer, or of other artefacts."""
    for path, found in kept_contents(bundle, _NAME, _File):
        if found.artefacts == artefacts_hash(bundle) and len(found.exits) == len(bundle.manifest.exits):
            return Acceptance(found.exits, found.text, str(path))
    return None


def _text_share(runs: Sequence[Run]) -> float | None:
    """How often a draft from text was right, given that those before it were; None if a model drafted too."""
    rounds = [each for run in runs for each in run.rounds]
    if not rounds or any(each.drafting for each in rounds):
        return None
    accepted = sum(len(each.accepted) for each in rounds)
    return accepted / (accepted + len(rounds))


def _named(model: str, exits: Sequence[int]) -> str:
    return f"{model}, cut at layers {', '.join(map(str, exits))}"
