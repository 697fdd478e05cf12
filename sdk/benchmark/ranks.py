"""What every inner exit would have said at each place of a text: from it any tree of an exit's can be replayed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from skipstone.devices.traces import RANKS
from skipstone.inputs import ModelInput
from skipstone.runtimes.sampling import likeliest
from skipstone.runtimes.session import Session


def exit_ranks(session: Session, given: ModelInput, tokens: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The place of each token but the first among an exit's choices, see `skipstone.devices.traces.Run.ranks`.

    One pass over the text, in blocks of the engine's width; the last segment is not run.

    Args:
        session: of the target; holds the text's beginning afterwards.
        given: what the text was generated from.
        tokens: what was generated.

    Returns:
        A row for each inner exit; none where the model has no draft head.
    """
    inner, ids = session.exits[:-1], session.engine.draft_vocabulary
    if ids is None or not inner:
        return ()
    session.rewind(0)
    given.enter(session)
    session.prefill(given.prompt)
    found: list[list[int]] = [[] for _ in inner]
    context, following = tokens[:-1], tokens[1:]
    for start, stop in pairwise([*range(0, len(context), session.max_width), len(context)]):
        rows = session.push(context[start:stop])
        for ranks, exit_layer in zip(found, inner, strict=True):
            best = ids[likeliest(np.stack(session.advance(rows, exit_layer)), RANKS)]
            hits = best == np.asarray(following[start:stop])[:, None]
            ranks += np.where(hits.any(axis=1), hits.argmax(axis=1), -1).tolist()
        session.commit(rows[-1])
    session.rewind(0)
    return tuple(map(tuple, found))
