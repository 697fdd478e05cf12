"""What some engines tell of a bundle beyond running it: where the time goes, and the memory. One line each here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from skipstone.bundle import Bundle
from skipstone.errors import UsageError
from skipstone.runtimes.engines import EngineOptions

if TYPE_CHECKING:
    from skipstone.runtimes.engines.executorch.memory import MemoryReport
    from skipstone.runtimes.engines.executorch.profile import Profile, ProfileProgress

Reporter = TypeVar("Reporter")
ReportProgress = Callable[["ProfileProgress"], None]
Profiler = Callable[[Bundle, EngineOptions, ReportProgress], "Profile"]
MemoryReporter = Callable[[Bundle, EngineOptions], "MemoryReport"]


def _executorch_profile(bundle: Bundle, options: EngineOptions, progress: ReportProgress) -> Profile:
    from skipstone.runtimes.engines.executorch.profile import profile_bundle

    return profile_bundle(bundle, options, progress=progress)


def _executorch_memory(bundle: Bundle, options: EngineOptions) -> MemoryReport:
    from skipstone.runtimes.engines.executorch.memory import report_memory

    return report_memory(bundle, options)


PROFILERS: dict[str, Profiler] = {"executorch": _executorch_profile}
MEMORY_REPORTERS: dict[str, MemoryReporter] = {"executorch": _executorch_memory}


def choose(reporters: Mapping[str, Reporter], format: str, flag: str) -> Reporter:
    """The reporter for a bundle's format.

    Raises:
        UsageError: there is none; names the flag that asked for it.
    """
    found = reporters.get(format)
    if found is None:
        known = ", ".join(reporters)
        raise UsageError(
            f"{flag}: {known} bundles only, this one's format is {format}",
            hint=f"leave {flag} out, or export with --format {next(iter(reporters))}",
        )
    return found
