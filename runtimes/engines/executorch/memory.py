"""Memory of an ExecuTorch bundle, as planned when it was exported and as taken when it is loaded.

    >>> report = report_memory(bundle, EngineOptions())
    >>> report.key_value_bytes, report.loaded.private

What loading takes is measured in a fresh process:
`python -m skipstone.runtimes.engines.executorch.memory FOLDER THREADS`.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

from pydantic import TypeAdapter

from skipstone.bundle import Bundle, ExecuTorchManifest, manifest_of, open_bundle
from skipstone.errors import EngineError, SkipstoneError
from skipstone.runtimes.cores import num_cores
from skipstone.runtimes.engines import EngineOptions
from skipstone.runtimes.engines.executorch.calls import MethodCalls
from skipstone.runtimes.engines.executorch.native import native
from skipstone.runtimes.engines.executorch.plan import MethodPlan, ProgramPlan, read_plan
from skipstone.runtimes.engines.executorch.profile import in_order
from skipstone.runtimes.engines.executorch.program import Program
from skipstone.runtimes.resident import Resident, own_resident

_OPENED = "program"
_REFUSED = 3


@dataclass(frozen=True)
class MethodMemory:
    """One method.

    Attributes:
        name: of the method.
        weight_bytes: that a call reads, by the manifest.
        key_value_bytes, activation_bytes: see `skipstone.runtimes.engines.executorch.plan.MethodPlan`.
        loading: what the process grew by when the method was loaded.
        calling: what it grew by at the first call, of the widest batch.
    """

    name: str
    weight_bytes: int
    key_value_bytes: int
    activation_bytes: int
    loading: Resident
    calling: Resident


@dataclass(frozen=True)
class MemoryReport:
    """A bundle's memory.

    Attributes:
        file_bytes: of the program.
        slots: positions of K/V.
        key_value_bytes, activation_bytes, packed_bytes, constant_bytes: see
            `skipstone.runtimes.engines.executorch.plan.ProgramPlan`.
        methods: in the order of a pass through the model, which is the order of the first calls.
        idle: a process with Python, torch and ExecuTorch, before the program is opened.
        opening: what it grew by when the file was opened and the arenas were made.
        loaded: everything loaded.
        called: and every method called.
    """

    file_bytes: int
    slots: int
    key_value_bytes: int
    activation_bytes: int
    packed_bytes: int
    constant_bytes: int
    methods: tuple[MethodMemory, ...]
    idle: Resident
    opening: Resident
    loaded: Resident
    called: Resident


def report_memory(bundle: Bundle, options: EngineOptions) -> MemoryReport:
    """Measure a bundle's memory in a fresh process.

    Args:
        bundle: opened.
        options: its threads are used.

    Raises:
        BundleError: a bundle of another format.
        EngineError: the program cannot be loaded, says why; or the process failed, shows what it wrote last.
    """
    manifest_of(bundle, ExecuTorchManifest)
    threads = num_cores() if options.threads is None else options.threads
    command = [sys.executable, "-m", __name__, str(bundle.path), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    last = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
    if done.returncode == _REFUSED:
        raise EngineError(last)
    if done.returncode != 0:
        raise EngineError(
            f"measuring the memory of {bundle.path}: exit status {done.returncode}: {last}",
            hint="export or copy the bundle again",
        )
    return TypeAdapter(MemoryReport).validate_json(done.stdout.strip().splitlines()[-1])


def measure(bundle: Bundle, threads: int) -> MemoryReport:
    """Measure a bundle in this process, which must not have loaded a program before."""
    manifest = manifest_of(bundle, ExecuTorchManifest)
    path = bundle.file(manifest.program.file)
    plan = read_plan(path)
    native()
    seen = [(_OPENED, own_resident())]
    program = Program(
        path, manifest.program, threads, loading=lambda name: seen.append((name, own_resident()))
    )
    loaded = own_resident()
    ends = [*(before for _, before in seen[1:]), loaded]
    grown = {name: end - before for (name, before), end in zip(seen, ends, strict=True)}
    calling = _first_calls(program, manifest)
    return MemoryReport(
        file_bytes=path.stat().st_size,
        slots=manifest.program.slots,
        key_value_bytes=plan.key_value_bytes,
        activation_bytes=plan.activation_bytes,
        packed_bytes=plan.packed_bytes,
        constant_bytes=plan.constant_bytes,
        methods=tuple(_method(name, plan, manifest, grown[name], spent) for name, spent in calling.items()),
        idle=seen[0][1],
        opening=grown[_OPENED],
        loaded=loaded,
        called=own_resident(),
    )


def _first_calls(program: Program, manifest: ExecuTorchManifest) -> dict[str, Resident]:
    """What the process grows by at every method's first call."""
    calls, found = MethodCalls(program, manifest), {}
    for name in in_order([method.name for method in manifest.program.methods]):
        call = calls.prepare(name, program.widest(name))
        before = own_resident()
        call()
        found[name] = own_resident() - before
    return found


def _method(
    name: str, plan: ProgramPlan, manifest: ExecuTorchManifest, loading: Resident, calling: Resident
) -> MethodMemory:
    planned: MethodPlan = next(method for method in plan.methods if method.name == name)
    weights = manifest.program.weight_bytes(name)
    return MethodMemory(name, weights, planned.key_value_bytes, planned.activation_bytes, loading, calling)


def main(folder: str, threads: str) -> int:
    """Measure in this process and print the report as JSON, or why it cannot be loaded on standard error."""
    try:
        report = measure(open_bundle(folder, verify_hashes=False), int(threads))
    except SkipstoneError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return _REFUSED
    print(TypeAdapter(MemoryReport).dump_json(report).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
