"""What a model says after every token of a text: logits at the last layer, the best token at every inner exit.

>>> reader = ArtefactReader(open_bundle("out/"), EngineOptions(threads=1), context_length=512)
>>> reading = reader.read(Probe((5, 7, 11)))
>>> reading.last.shape, reading.best[2]
((3, 4096), array([  7, 311,  11]))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from skipstone.bundle import Bundle
from skipstone.exporters.probe import Probe
from skipstone.runtimes.engines import EngineOptions, open_engine
from skipstone.runtimes.session import Session

FloatArray = NDArray[np.float32]
TokenArray = NDArray[np.int64]


@dataclass(frozen=True)
class Reading:
    """What a model says of a text of n tokens.

    Attributes:
        last: logits of the last layer after every token, [n, vocab_size].
        best: by inner exit, the likeliest token after every token, [n].
    """

    last: FloatArray
    best: dict[int, TokenArray] = field(default_factory=dict)


class Reader(Protocol):
    """A model that reads texts, one at a time."""

    def read(self, probe: Probe) -> Reading:
        """Every text is read afresh."""

    def close(self) -> None:
        """Free the weights. Idempotent."""


class ArtefactReader:
    """A bundle, through the session that generates. Its inner exits choose among the tokens of its draft head.

    Args:
        bundle: the checked bundle.
        options: engine options.
        context_length: positions to hold, those of the longest text.

    Raises:
        EngineError: the engine refuses to load it.
        UsageError: more positions than it holds.
    """

    def __init__(self, bundle: Bundle, options: EngineOptions, context_length: int) -> None:
        self._engine = open_engine(bundle, options)
        try:
            self.session = Session(self._engine, context_length)
        except Exception:
            self._engine.close()
            raise

    def read(self, probe: Probe) -> Reading:
        session, vocabulary = self.session, self._engine.draft_vocabulary
        session.rewind(0)
        if probe.source:
            session.encode(probe.source)
        inner = session.exits[:-1] if vocabulary is not None else ()
        last: list[FloatArray] = []
        best: dict[int, list[int]] = {exit_layer: [] for exit_layer in inner}
        for first in range(0, len(probe.tokens), session.max_width):
            rows = session.push(probe.tokens[first : first + session.max_width])
            for exit_layer in inner:
                best[exit_layer] += [int(row.argmax()) for row in session.advance(rows, exit_layer)]
            last += session.advance(rows, session.exits[-1])
            session.commit(rows[-1])
        if vocabulary is None:
            return Reading(np.stack(last))
        ids = vocabulary.astype(np.int64)
        return Reading(np.stack(last), {exit_layer: ids[found] for exit_layer, found in best.items()})

    def close(self) -> None:
        self.session.close()
        self._engine.close()


class CheckpointReader:
    """A checkpoint in torch, float32, with its whole head at every exit.

    Args:
        folder: the checkpoint's.
        exits: inner exits to read, layer counts; of an encoder-decoder the decoder's.
    """

    def __init__(self, folder: Path, exits: Sequence[int] = ()) -> None:
        from skipstone.exporters.checkpoint import load_eager

        self.model: Any = load_eager(folder)
        self._exits = tuple(exits)

    def read(self, probe: Probe) -> Reading:
        import torch

        from skipstone.exporters.compress.fidelity import read_window

        ids = torch.tensor([list(probe.tokens)])
        inputs = {"input_ids": ids}
        if probe.source:
            inputs = {"input_ids": torch.tensor([list(probe.source)]), "decoder_input_ids": ids}
        return read_window(self.model, self._exits, inputs)

    def close(self) -> None:
        """Nothing to free: torch's memory goes with the object."""
