"""Resident memory of this process."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Resident:
    """Resident memory, or a change of it, in bytes.

    Attributes:
        private: allocated by the process: what it computes with, and weights in the form a kernel wants them in.
        mapped: pages of files, program code among them; the system may drop and read them again.
    """

    private: int
    mapped: int

    def __sub__(self, before: Resident) -> Resident:
        return Resident(self.private - before.private, self.mapped - before.mapped)

    def __add__(self, more: Resident) -> Resident:
        return Resident(self.private + more.private, self.mapped + more.mapped)

    @property
    def total(self) -> int:
        """Both."""
        return self.private + self.mapped


def own_resident() -> Resident:
    """Resident memory of this process now; where the system does not tell, its peak, all of it as private."""
    fields = _status()
    if "RssAnon" not in fields:
        return Resident(own_peak_bytes(), 0)
    return Resident(fields["RssAnon"], fields["RssFile"] + fields["RssShmem"])


def own_peak_bytes() -> int:
    """Peak resident memory of this process.

    Linux hands `ru_maxrss` of the parent down through fork and exec, so the kernel's figure for this very
    address space is read instead.
    """
    fields = _status()
    if "VmHWM" in fields:
        return fields["VmHWM"]
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def _status() -> dict[str, int]:
    """The kernel's figures in bytes by their names; empty where there are none."""
    if not _STATUS.is_file():
        return {}
    lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    pairs = (line.partition(":") for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, _, value in pairs}
