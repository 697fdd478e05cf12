"""The self-test at the end of every export: the artefact against its source, before the bundle is put in
place.

1. reference: the pipeline's logits against eager transformers in f32;
2. split: the segments against the uncut model in the same quantisation;
3. draft then verify: rows brought to an exit first and to the end later, against rows brought to the end at
   once;
4. trees: rows accepted out of trees with rejected siblings before them, against rows run at once: K/V must move, and
   segments that do not share their state with what moves it are found out;
5. width noise: the same row alone and within wider batches;
6. jitter: the gap between the two best tokens when the rows entering each segment change by a millionth, as
   another order of summing does. With rounded activations it may change by much more, so the near-tie margin
   covers it;
7. draft head: its logits at every exit against the final norm and the head's rows computed here.

An encoder-decoder is given a source first, and then put to the same tests on its decoder's rows.

The engine runs in a process of its own, so that a crash becomes an error that says so. So does the uncut model, unless
it is one of eager torch's that reads its weights from the bundle: this process has loaded torch already.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstone.bundle import Bundle, Parity, open_bundle
from skipstone.errors import ExportError
from skipstone.exporters.drafted import Drafted, UncutModel, head_error, load_drafts, save_drafts
from skipstone.exporters.formats import Oracle
from skipstone.exporters.isolation import num_threads, run_isolated
from skipstone.exporters.probe import Probe
from skipstone.exporters.reference import EagerReference
from skipstone.runtimes.engines.base import Engine
from skipstone.runtimes.jitter import gap_jitter, segment_by_segment
from skipstone.runtimes.rows import ROOT, RowTree
from skipstone.runtimes.session import Session

FloatArray = NDArray[np.float32]

_MIN_MARGIN = 1e-4
_WIDTHS = (1, 4, 16)
_STEPPED = 32  # tokens of the probe in the runs that go row by row
# Cut or whole, the same kernels see the same numbers; only the order of a sum may differ. Beside quantised
# weights, activations are rounded too, and such a difference may flip a rounding: tolerances in units of the
# logits' spread. Of even noise with the rms allowed, one logit in ten thousand is 3.9 times as far off.
_EXACT_SPLIT, _QUANTIZED_SPLIT = 1e-3, 0.39
_QUANTIZED_SPLIT_RMS = 0.1
_DRAFT_HEAD_TOLERANCE = 0.05
_HEAD_ROWS = 512


@dataclass(frozen=True)
class SelfTest:
    """What to compare with.

    Attributes:
        oracle: the uncut model.
        reference: checkpoint folder; None: there is none.
        probe: what is run.
        min_agreement: share of positions at which the best token must be the reference's.
        reference_tolerance: largest difference of a logit from the reference, where logits spread by 1 or less, in
            proportion where they spread more; None: only the agreement counts.
        slack: by which the tolerances between the artefact's own ways to compute grow: where activations have few bits,
            two implementations of the same rounding drift apart.
    """

    oracle: Oracle
    reference: Path | None
    probe: Probe
    min_agreement: float
    reference_tolerance: float | None
    slack: float = 1.0


@dataclass(frozen=True)
class Measured:
    """Largest absolute differences of logits (quantised: but for one in ten thousand); `draft_head` is relative,
    `agreement` a share of equal best tokens.
    """

    finite: bool
    spread: float
    reference: float | None
    agreement: float | None
    split: float
    split_rms: float
    draft_verify: float
    tree_commit: float
    width_noise: float
    jitter: float
    draft_head: float


def run_self_test(folder: Path, test: SelfTest, scratch: Path) -> Parity:
    """Measure and judge.

    Args:
        folder: the unfinished bundle, its manifest written.
        test: what to compare with.
        scratch: folder for intermediate files.

    Raises:
        ExportError: a figure is past its tolerance, or the engine crashed.
    """
    probe, oracle = test.probe, test.oracle
    reference, whole, drafts = (scratch / name for name in ("reference.npy", "whole.npy", "drafts.npz"))
    if test.reference is not None:
        np.save(reference, EagerReference(test.reference).logits(probe.tokens, probe.source))
    uncut = None
    if oracle.here:
        uncut = _uncut(oracle, open_bundle(folder, verify_hashes=False))
        np.save(whole, _whole_logits(uncut, probe))
    answer = run_isolated(
        "skipstone.exporters.selftest:measure",
        folder=str(folder),
        oracle=None if oracle.here else asdict(oracle),
        whole=str(whole),
        drafts=str(drafts),
        reference=None if test.reference is None else str(reference),
        tokens=list(probe.tokens),
        source=list(probe.source),
        exact=test.reference_tolerance is not None,
    )
    measured = Measured(**answer)
    if uncut is not None:
        measured = replace(measured, draft_head=head_error(load_drafts(drafts), uncut))
    return judge(measured, test)


def judge(measured: Measured, test: SelfTest) -> Parity:
    """The manifest's figures.

    Raises:
        ExportError: naming the first figure past its tolerance.
    """
    exact = test.reference_tolerance is not None
    split_tolerance = test.slack * (_EXACT_SPLIT if exact else _QUANTIZED_SPLIT * measured.spread)
    checks = [
        (measured.finite, "logits are not finite"),
        _within("segments and the whole model", measured.split, split_tolerance),
        _within(
            "segments and the whole model (rms)",
            measured.split_rms,
            test.slack * _QUANTIZED_SPLIT_RMS * measured.spread,
        ),
        _within(
            "drafted and then verified rows and rows run at once", measured.draft_verify, split_tolerance
        ),
        _within("rows accepted out of trees and rows run at once", measured.tree_commit, split_tolerance),
        _within(
            "draft head and the final norm and head rows (relative)",
            measured.draft_head,
            _DRAFT_HEAD_TOLERANCE,
        ),
    ]
    if measured.agreement is not None:
        checks.append(
            _at_least("best tokens that agree with the reference", measured.agreement, test.min_agreement)
        )
    # what rounding in float32 does grows with the logits
    allowed = test.reference_tolerance
    tolerance = None if allowed is None else allowed * max(1.0, measured.spread)
    if measured.reference is not None and tolerance is not None:
        checks.append(_within("logits and the reference", measured.reference, tolerance))
    for passed, message in checks:
        if not passed:
            raise ExportError(
                f"self-test: {message}", hint="nothing was written; please report the model and the flags"
            )
    return Parity(
        reference=measured.reference,
        reference_tolerance=tolerance,
        split=measured.split,
        split_tolerance=split_tolerance,
        draft_verify=max(measured.draft_verify, measured.tree_commit),
        width_noise=measured.width_noise,
        near_tie_margin=max(
            _MIN_MARGIN,
            2 * measured.width_noise,
            2 * max(measured.draft_verify, measured.tree_commit),
            measured.jitter,
        ),
        agreement_with_reference=measured.agreement,
    )


def measure(
    folder: str,
    oracle: dict[str, Any] | None,
    whole: str,
    drafts: str,
    reference: str | None,
    tokens: list[int],
    source: list[int],
    exact: bool,
) -> dict[str, object]:
    """Run the unfinished bundle; see the module. Called through `run_isolated`.

    Where nothing is quantised (`exact`) every single logit counts. With an `oracle` the uncut model is asked here; else
    its logits lie in `whole`, and what the draft head says is left in `drafts`.

    Returns:
        The fields of `Measured`.
    """
    from skipstone.runtimes.engines import EngineOptions, open_engine

    bundle = open_bundle(folder, verify_hashes=False)
    threads = num_threads(sum(entry.size for entry in bundle.manifest.files))
    probe = Probe(tuple(tokens), tuple(source))
    uncut = None if oracle is None else _uncut(Oracle(**oracle), bundle)
    expected_whole = np.load(whole) if uncut is None else _whole_logits(uncut, probe)
    engine = open_engine(bundle, EngineOptions(kv_type="f32", threads=threads))
    at_once = _in_widths(engine, probe, len(tokens))
    difference = _difference if exact else _usual_difference
    expected = None if reference is None else np.load(reference)
    accepted = _accepted_out_of_trees(engine, probe)
    measured = Measured(
        finite=bool(np.isfinite(at_once).all()),
        spread=float(at_once.std()),
        reference=None if expected is None else _difference(at_once, expected),
        agreement=None if expected is None else float((at_once.argmax(-1) == expected.argmax(-1)).mean()),
        split=difference(at_once, expected_whole),
        split_rms=float(np.sqrt(((at_once - expected_whole) ** 2).mean())),
        draft_verify=max(
            (difference(at_once[: len(x)], x) for x in _drafted_then_verified(engine, probe)), default=0.0
        ),
        tree_commit=difference(at_once[: len(accepted)], accepted),
        width_noise=_width_noise(engine, probe),
        jitter=gap_jitter(engine, probe.tokens, probe.source),
        draft_head=0.0 if uncut is None else head_error(_drafted(engine, probe), uncut),
    )
    if uncut is None:
        save_drafts(Path(drafts), _drafted(engine, probe))
    engine.close()
    return asdict(measured)


@contextmanager
def _session(engine: Engine, probe: Probe) -> Iterator[Session]:
    """A session with room for the probe, its source encoded."""
    with Session(engine, _context_length(engine, probe)) as session:
        if probe.source:
            session.encode(probe.source)
        yield session


def _in_widths(engine: Engine, probe: Probe, width: int, count: int | None = None) -> FloatArray:
    """Logits [n, vocab_size] at the last exit, `width` rows at a time; of the first `count` tokens."""
    found: list[FloatArray] = []
    tokens = probe.tokens[:count]
    with _session(engine, probe) as session:
        width = min(width, session.max_width)
        for start in range(0, len(tokens), width):
            rows = session.push(tokens[start : start + width])
            found += session.advance(rows, session.exits[-1])
            session.commit(rows[-1])
    return np.stack(found)


def _drafted_then_verified(engine: Engine, probe: Probe) -> Iterator[FloatArray]:
    """For each inner exit: logits of rows run one by one to it first, and in blocks of four to the end
    later.
    """
    tokens = probe.tokens[:_STEPPED]
    for exit_layer in engine.exits[:-1]:
        found: list[FloatArray] = []
        with _session(engine, probe) as session:
            for start in range(0, len(tokens), 4):
                rows = session.push(tokens[start : start + 4])
                for row in rows:
                    session.advance([row], exit_layer)
                found += session.advance(rows, session.exits[-1])
                session.commit(rows[-1])
        yield np.stack(found)


def _accepted_out_of_trees(engine: Engine, probe: Probe) -> FloatArray:
    """Logits [n, vocab_size] of tokens that follow each other through trees: each has a rejected sibling before it."""
    room = _context_length(engine, probe) - 2  # for the last two's siblings
    tokens = probe.tokens[: min(_STEPPED, room) // 2 * 2]
    found: list[FloatArray] = []
    with _session(engine, probe) as session:
        for start in range(0, len(tokens), 2):
            parent, rows = ROOT, []
            for token in tokens[start : start + 2]:
                wrong, right = session.push([(token + 1) % engine.vocab_size, token], [parent, parent])
                rows += [wrong, right]
                parent = right
            found += session.advance(rows, session.exits[-1])[1::2]
            session.commit(parent)
    return np.stack(found)


def _width_noise(engine: Engine, probe: Probe) -> float:
    alone, *wider = (_in_widths(engine, probe, width, _STEPPED) for width in _WIDTHS)
    return max(_difference(alone, other) for other in wider)


def _drafted(engine: Engine, probe: Probe) -> Iterator[Drafted]:
    """What the draft head says at every inner exit."""
    if engine.draft_vocabulary is None:
        return
    sample = slice(None, None, -(-len(engine.draft_vocabulary) // _HEAD_ROWS))
    cache = engine.open_cache(_context_length(engine, probe), RowTree())
    for segment, hidden in segment_by_segment(engine, probe.tokens, probe.source):
        if segment < len(engine.exits) - 1:
            found = cache.draft_logits(list(hidden))[:, sample]
            yield Drafted(hidden.copy(), engine.draft_vocabulary[sample], found)
    cache.close()


def _uncut(oracle: Oracle, bundle: Bundle) -> UncutModel:
    module, name = oracle.made_by.split(":")
    uncut: UncutModel = getattr(importlib.import_module(module), name)(bundle, **oracle.arguments)
    return uncut


def _whole_logits(uncut: UncutModel, probe: Probe) -> FloatArray:
    tokens = list(probe.tokens)
    return np.array(uncut.logits(tokens, list(probe.source)) if probe.source else uncut.logits(tokens))


def _context_length(engine: Engine, probe: Probe) -> int:
    return min(engine.max_context_length, 2 * len(probe.tokens))


def _difference(one: FloatArray, other: FloatArray) -> float:
    return float(np.abs(one - other).max())


def _usual_difference(one: FloatArray, other: FloatArray) -> float:
    """The largest difference but for one logit in ten thousand: the largest of all grows with their number, by millions
    where vocabularies are large, and says less and less. A single row gone wrong is still found.
    """
    return float(np.quantile(np.abs(one - other), 0.9999))


def _within(what: str, found: float, tolerance: float) -> tuple[bool, str]:
    return found <= tolerance, f"{what} differ by {found:.3g}, at most {tolerance:.3g} is allowed"


def _at_least(what: str, found: float, least: float) -> tuple[bool, str]:
    return found >= least, f"{what}: {found:.0%}, at least {least:.0%} is expected"
