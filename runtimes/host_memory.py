"""How much memory this process could still be given."""

from __future__ import annotations

from pathlib import Path

_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
# of control groups, versions 2 and 1: the limit, what is used of it, and how much of that files take
_LAYOUTS = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


def available_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int | None:
    """Memory that can be had without swapping, files in the page cache counting as free; the container's share where one
    limits it. None where the system does not tell (Linux alone does).
    """
    machine = _meminfo(meminfo)
    if machine is None:
        return None
    container = _cgroup(cgroup)
    return machine if container is None else min(machine, container)


def _meminfo(path: Path) -> int | None:
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found and found[0].isdigit() else None


def _cgroup(folder: Path) -> int | None:
    """What is left of a container's limit; None without one."""
    for limit_name, used_name, stat_name in _LAYOUTS:
        try:
            limit, used = ((folder / name).read_text().strip() for name in (limit_name, used_name))
            stat = dict(line.split() for line in (folder / stat_name).read_text().splitlines())
            cached = sum(int(stat.get(f"{kind}_file", 0)) for kind in ("active", "inactive"))
            return None if limit == "max" else max(0, int(limit) - int(used) + cached)
        except (OSError, ValueError):
            continue
    return None
