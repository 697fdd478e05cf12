"""Where the time of a program goes: every method at a few widths, operator by operator, from ExecuTorch's ETDump.

    >>> profile = profile_bundle(bundle, EngineOptions())
    >>> [(time.operator, time.share) for time in profile.methods[0].operators]

What a delegate runs is told apart by its own profiler, which counts whole microseconds: what it loses stands with the
delegate's call.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from skipstone.bundle import Bundle, ExecuTorchManifest, manifest_of
from skipstone.errors import EngineError
from skipstone.runtimes.cores import num_cores
from skipstone.runtimes.engines.executorch.calls import Layout, MethodCalls
from skipstone.runtimes.engines.executorch.program import Program
from skipstone.runtimes.quiet import quiet_libraries

if TYPE_CHECKING:
    from skipstone.runtimes.engines import EngineOptions

WIDTHS = (1, 4, 16)
INTERPRETER = "interpreter"
_WARM_UP, _REPEATS = 3, 12
_EXECUTE, _KERNEL_CALL, _DELEGATE_CALL = "Method::execute", "OPERATOR_CALL", "DELEGATE_CALL"
_JUMPS = frozenset({"JF_CALL", "MOVE_CALL", "FREE_CALL"})


@dataclass(frozen=True)
class OperatorTime:
    """One operator in a call of a method.

    Attributes:
        operator: a kernel's name, or the delegate's with its own operator's.
        calls: per call of the method.
        microseconds: all these calls together.
        share: of the method's time.
    """

    operator: str
    calls: int
    microseconds: float
    share: float


@dataclass(frozen=True)
class MethodProfile:
    """A method at one width; times are means over the faster half of the calls.

    Attributes:
        method: its name.
        layout: of a segment's rows; None for other methods.
        width: rows.
        wall_microseconds: of a call from Python, while recording.
        microseconds: of these, in ExecuTorch.
        operators: the longest first.
    """

    method: str
    layout: Layout | None
    width: int
    wall_microseconds: float
    microseconds: float
    operators: tuple[OperatorTime, ...]


@dataclass(frozen=True)
class Profile:
    """A bundle's methods in the order of a pass through the model.

    Attributes:
        target: where the program was lowered to.
        threads: of the pool.
        repeats: calls of every method, width and layout.
        methods: one entry per method, layout and width.
    """

    target: str
    threads: int
    repeats: int
    methods: tuple[MethodProfile, ...]


@dataclass(frozen=True)
class ProfileProgress:
    """`done` of `total` measurements are made; `method` comes next."""

    method: str
    done: int
    total: int


def profile_bundle(
    bundle: Bundle,
    options: EngineOptions,
    widths: Sequence[int] = WIDTHS,
    progress: Callable[[ProfileProgress], None] = lambda _progress: None,
) -> Profile:
    """Measure every method of an ExecuTorch bundle.

    Args:
        bundle: opened.
        options: its threads are used.
        widths: rows per call; those that the program does not take are left out.
        progress: told before every measurement.

    Raises:
        BundleError: a bundle of another format, or its program does not fit the manifest.
        EngineError: ExecuTorch is missing, refuses the file, or was built without its event tracer.
    """
    manifest = manifest_of(bundle, ExecuTorchManifest)
    entry = manifest.program
    threads = num_cores() if options.threads is None else options.threads
    program = Program(bundle.file(entry.file), entry, threads, record=True)
    calls, found = MethodCalls(program, manifest), []
    names = in_order([method.name for method in entry.methods])
    wanted = list(_measurements(names, [width for width in widths if width <= entry.max_width]))
    for done, (method, layout, width) in enumerate(wanted):
        progress(ProfileProgress(method, done, len(wanted)))
        call = calls.prepare(method, width, layout or "chain")
        wall, record = _recorded(program, call)
        total, operators = _operators(record, method, wall, entry.target)
        faster = wall[np.argsort(wall)[: _REPEATS // 2]].mean()
        found.append(MethodProfile(method, layout, width, float(faster), total, operators))
    return Profile(entry.target, threads, _REPEATS, tuple(found))


def in_order(methods: Sequence[str]) -> list[str]:
    """Methods in the order of a pass: embedding, encoder, segments, heads, compaction."""
    kinds = ("embed", "encoder", "cross", "segment", "draft", "head", "compact")

    def place(name: str) -> tuple[int, int]:
        kind, _, number = name.partition("_")
        return kinds.index(kind), int(number) if number.isdecimal() else 0

    return sorted(methods, key=place)


def _measurements(methods: Sequence[str], widths: Sequence[int]) -> Iterator[tuple[str, Layout | None, int]]:
    for method in methods:
        layouts: tuple[Layout | None, ...] = ("chain", "tree") if method.startswith("segment_") else (None,)
        for layout in layouts:
            for width in widths:
                yield method, layout, width


def _recorded(program: Program, call: Callable[[], object]) -> tuple[NDArray[np.float64], Any]:
    """Microseconds of every call as Python sees it, and what ExecuTorch recorded of the same calls."""
    with quiet_libraries():
        from executorch.devtools import Inspector
    for _ in range(_WARM_UP):
        call()
    wall = []
    with tempfile.TemporaryDirectory(prefix="skipstone-") as folder:
        record = Path(folder) / "calls.etdump"
        program.write_record(record)  # empties it of the warm-up
        for _ in range(_REPEATS):
            began = time.perf_counter()
            call()
            wall.append((time.perf_counter() - began) * 1e6)
        program.write_record(record)
        with quiet_libraries():
            inspector = Inspector(etdump_path=str(record))
    return np.array(wall), inspector


def _operators(
    inspector: Any, method: str, wall: NDArray[np.float64], target: str
) -> tuple[float, tuple[OperatorTime, ...]]:
    """Microseconds of a call, and of its operators.

    Raises:
        EngineError: nothing was recorded.
    """
    events = next((block.events for block in inspector.event_blocks if block.name == "Execute"), ())
    series = [(event, np.array(event.perf_data.raw) * 1e3) for event in events if event.perf_data]
    whole = next((times for event, times in series if event.name == _EXECUTE), None)
    if whole is None or len(whole) != len(wall):
        raise EngineError(
            f"{method}: ExecuTorch recorded {0 if whole is None else len(whole)} of {len(wall)} calls",
            hint="--profile needs a build of ExecuTorch with its event tracer, as its wheels have",
        )
    faster = np.argsort(whole)[: len(whole) // 2]  # interruptions only ever make a call slower
    total = float(whole[faster].mean())
    sums: dict[str, tuple[int, float]] = {}
    means = [(event, float(times[faster].mean())) for event, times in series]
    for name, microseconds in _named(means, target):
        calls, before = sums.get(name, (0, 0.0))
        sums[name] = calls + 1, before + microseconds
    sums[INTERPRETER] = 1, max(0.0, total - sum(microseconds for _, microseconds in sums.values()))
    ordered = sorted(sums.items(), key=lambda item: -item[1][1])
    return total, tuple(OperatorTime(name, calls, spent, spent / total) for name, (calls, spent) in ordered)


def _named(events: Sequence[tuple[Any, float]], target: str) -> Iterator[tuple[str, float]]:
    """Operators and their microseconds; what an instruction did inside stands before its own event."""
    inside: list[tuple[str, float]] = []
    kernel = None
    for event, microseconds in events:
        if event.is_delegated_op:
            inside.append((f"{target}: {_without_number(event.name)}", microseconds))
        elif event.name == _DELEGATE_CALL:
            yield from inside
            yield f"{target}: the call itself", max(0.0, microseconds - sum(spent for _, spent in inside))
            inside = []
        elif event.name == _KERNEL_CALL:
            yield kernel or "views and sizes", microseconds
            kernel = None
        elif event.name in _JUMPS:
            yield "jumps and moves", microseconds
        elif event.name != _EXECUTE:
            kernel = event.name.removeprefix("native_call_").partition(".")[0]


def _without_number(name: str) -> str:
    return re.sub(r" #\d+$", "", name)
