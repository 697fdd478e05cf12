"""Computing less than the whole model where it seems sure. Lossy: the output may differ from plain decoding's.

- `Saturation`: the encoder stops at an exit where a segment has hardly turned its hidden states any more (MuE, arXiv
  2211.11152, section 3.1).
- `generate_adaptively`: a token leaves the decoder at the first exit whose head is sure enough (CALM, 2207.07061,
  section 3.3: softmax margin, with a threshold that decays as in equation 5). The paper copies the exit's hidden state
  into the layers that were skipped; here rows lag, and are caught up in one batch when a later token needs those
  layers, so that nothing but the choice of tokens is approximate.
- `calibrated_options`: the thresholds that `skipstone calibrate` found, with what it has shown of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from skipstone.bundle import Calibration, Knob, Manifest
from skipstone.errors import UsageError
from skipstone.runtimes.generate import GenerationLimits, Step, StopReason
from skipstone.runtimes.risk import Guarantee
from skipstone.runtimes.sampling import softmax
from skipstone.runtimes.session import Session

_DECAY = 4.0  # τ of equation 5


@dataclass(frozen=True)
class AdaptiveOptions:
    """Where to stop early.

    Attributes:
        early_exit_margin: a token leaves the decoder where the two best probabilities of an inner exit's head differ by
            more than about this, a value in [0, 1]; None: never.
        encoder_saturation: the encoder stops where the cosine of its hidden states before and after a segment exceeds
            this, a value in [-1, 1], in the mean over the tokens; None: never.
        guarantee: what a calibration has shown of these values; None: nothing.
    """

    early_exit_margin: float | None = None
    encoder_saturation: float | None = None
    guarantee: Guarantee | None = None

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        margin, saturation = self.early_exit_margin, self.encoder_saturation
        if margin is not None and not 0 <= margin <= 1:
            raise UsageError(f"--early-exit-margin {margin}: expected a value in [0, 1]")
        if saturation is not None and not -1 <= saturation <= 1:
            raise UsageError(f"--encoder-saturation {saturation}: expected a value in [-1, 1]")

    @property
    def lossy(self) -> bool:
        """Whether anything may stop early."""
        return self.early_exit_margin is not None or self.encoder_saturation is not None

    @property
    def horizon(self) -> int | None:
        """For `generate_adaptively`: a calibrated margin falls as it fell when it was calibrated."""
        return None if self.guarantee is None else self.guarantee.max_new_tokens

    @property
    def settled(self) -> Saturation | None:
        """For `Session.encode`."""
        return None if self.encoder_saturation is None else Saturation(self.encoder_saturation)


@dataclass(frozen=True)
class Saturation:
    """See `skipstone.runtimes.engines.base.Settled`."""

    threshold: float

    def __call__(self, exit: int, before: NDArray[np.float32], after: NDArray[np.float32]) -> bool:
        lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
        cosines = (before * after).sum(axis=1) / np.maximum(lengths, 1e-12)
        return float(cosines.mean()) > self.threshold


def calibrated_options(folder: Path, manifest: Manifest, knob: Knob) -> AdaptiveOptions:
    """What a bundle's calibration of a knob allows: its threshold, or nothing where none was found.

    Args:
        folder: the bundle's, to name it.
        manifest: the bundle's.
        knob: the flag that was calibrated, the other one stays unset.

    Raises:
        UsageError: it was not calibrated.
    """
    found: Calibration | None = next((c for c in manifest.calibrations if c.knob == knob), None)
    if found is None:
        raise UsageError(
            f"--{knob} calibrated: {folder} holds no calibration of it",
            hint=f"run `skipstone calibrate {folder} --prompts FILE.jsonl --knob {knob}`",
        )
    shown = Guarantee(found.risk, found.max_loss, found.confidence, found.samples, found.max_new_tokens)
    if knob == "early-exit-margin":
        return AdaptiveOptions(early_exit_margin=found.value, guarantee=shown)
    return AdaptiveOptions(encoder_saturation=found.value, guarantee=shown)


def generate_adaptively(
    session: Session,
    prompt: Sequence[int],
    margin: float,
    limits: GenerationLimits,
    horizon: int | None = None,
) -> Generator[Step]:
    """Generate greedily after a prompt; a step is one token, its `drafter` the exit it came from, "" for the last one.

    Args:
        session: holds the context; the prompt is appended to it.
        prompt: token ids, at least one.
        margin: λ, see `AdaptiveOptions`.
        limits: when to stop.
        horizon: number of tokens over which the threshold falls to the margin; None: as many as `limits` allow.

    Raises:
        UsageError, ContextFullError: an empty or over-long prompt, or a model without a draft head; the session is as
            before.
    """
    if session.engine.draft_vocabulary is None or len(session.exits) == 1:
        raise UsageError("this bundle has no early exits", hint="export it with --exits")
    start, horizon = session.length, horizon or limits.max_new_tokens
    token, name, began = int(session.prefill(prompt).argmax()), "", time.perf_counter()
    emitted = 0
    try:
        while True:
            emitted += 1
            stop = _stop(session, token, emitted, limits)
            now = time.perf_counter()
            yield Step((token,), 0, 0, (), name, 0.0, now - began, stop)
            if stop is not None:
                return
            began = time.perf_counter()
            (row,) = session.push([token])
            token, name = _next(session, row, _threshold(margin, emitted, horizon))
            session.commit(row)
    finally:
        session.discard()
        session.rewind(min(session.length, start + len(prompt) + max(0, emitted - 1)))


def _next(session: Session, row: int, threshold: float) -> tuple[int, str]:
    """The token after a row, and the exit that was sure of it."""
    ids = session.engine.draft_vocabulary
    for exit_layer in session.exits[:-1]:
        (logits,) = session.advance([row], exit_layer)
        first, second = np.partition(softmax(logits), -2)[:-3:-1] if len(logits) > 1 else (1.0, 0.0)
        if ids is not None and first - second > threshold:
            return int(ids[int(logits.argmax())]), f"exit {exit_layer}"
    (logits,) = session.advance([row], session.exits[-1])
    return int(logits.argmax()), ""


def _threshold(margin: float, generated: int, horizon: int) -> float:
    """Early tokens, on which more depends, must be surer (after equation 5, but so that a margin of 1 means never)."""
    return margin + 0.1 * (1.0 - margin) * math.exp(-_DECAY * generated / horizon)


def _stop(session: Session, token: int, emitted: int, limits: GenerationLimits) -> StopReason | None:
    if token in limits.eos_token_ids:
        return "eos"
    if emitted >= limits.max_new_tokens:
        return "length"
    return "context" if session.room < 1 else None
