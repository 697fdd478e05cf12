"""A loaded .pte whose calls are checked before they are made.

ExecuTorch trusts its caller: a width of 0 kills the process (SIGFPE), and so may a shape outside the exported bounds.
Every call goes through `Program.call`, which compares widths, dtypes and layout with what was exported.
"""

from __future__ import annotations

import gc
import os
import struct
import weakref
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstone.bundle import ProgramEntry
from skipstone.errors import BundleError, EngineError
from skipstone.runtimes.engines.executorch.backends import check_target
from skipstone.runtimes.engines.executorch.native import native
from skipstone.runtimes.engines.executorch.signature import Signature, signature_of
from skipstone.runtimes.quiet import quiet_libraries

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

_LIVE: weakref.WeakSet[Program] = weakref.WeakSet()
# root offset, identifier, "eh00", bytes of the header, of the program, offset and bytes of what follows it
_HEADER = struct.Struct("<4x4s4s4xQQQ")
_IDENTIFIER, _MAGIC = b"ET12", b"eh00"


class Program:
    """One loading of the file: its methods and, shared between them, the K/V of one sequence.

    Args:
        path: the file.
        entry: what the manifest says of it.
        threads: of ExecuTorch's pool.
        methods: to load; None: all that the manifest names.
        record: keep the times of all operators for `write_record`; calls get a little slower.
        loading: told of every method before it is loaded.

    Raises:
        EngineError: ExecuTorch is missing or refuses the file.
        BundleError: the file is no program, or its methods are not those the manifest names.
        DeviceError: it was lowered for a device that is not this one.
    """

    def __init__(
        self,
        path: Path,
        entry: ProgramEntry,
        threads: int,
        *,
        methods: Collection[str] | None = None,
        record: bool = False,
        loading: Callable[[str], None] = lambda _name: None,
    ) -> None:
        self.path, self._entry = path, entry
        if entry.interface != entry.called_interface:
            raise BundleError(
                f"{path}: its methods follow interface {entry.interface}, this release calls interface "
                f"{entry.called_interface}",
                hint="export the bundle again",
            )
        check_header(path)
        check_target(path, entry.target)
        set_threads(threads)
        try:
            program = _open(path, record=record)
            present = _method_names(program)
            wanted = {method.name for method in entry.methods}
            if present != wanted:
                raise BundleError(
                    f"{path}: has the methods {', '.join(sorted(present))}, the manifest names "
                    f"{', '.join(sorted(wanted))}",
                    hint="export the bundle again",
                )
            self._methods: dict[str, Any] = {}
            for name in sorted(wanted if methods is None else methods):
                loading(name)
                with quiet_libraries():
                    self._methods[name] = program.load_method(name)
        except (RuntimeError, MemoryError, ValueError) as error:
            raise EngineError(
                f"{path}: ExecuTorch cannot load it: {error}", hint="export the bundle again"
            ) from error
        self._program = program
        self._widest = {name: signature.widest for name, signature in self.signatures.items()}
        self._pinned: dict[int, tuple[NDArray[Any], Any]] = {}
        _LIVE.add(self)

    @property
    def signatures(self) -> dict[str, Signature]:
        """What every loaded method takes and gives.

        Raises:
            EngineError: ExecuTorch cannot tell.
        """
        try:
            return {name: signature_of(method.method_meta()) for name, method in self._methods.items()}
        except (RuntimeError, IndexError, ValueError) as error:
            raise EngineError(
                f"{self.path}: a method's inputs and outputs cannot be read: {error}",
                hint="export the bundle again",
            ) from error

    def widest(self, method: str) -> int:
        """Most rows that a method takes."""
        return self._widest[method]

    def call(self, method: str, width: int, *inputs: NDArray[Any]) -> FloatArray:
        """Run a method.

        Args:
            method: its name.
            width: rows of the batch.
            inputs: its arguments, contiguous.

        Returns:
            The first output without its batch axis; the caller owns it.

        Raises:
            EngineError: a width the program was not made for, an array it cannot take, or ExecuTorch refused.
        """
        widest = self._widest[method]
        if not 1 <= width <= widest:
            raise EngineError(f"{method}: {width} rows, the program takes 1 to {widest}")
        if not self._methods:
            raise EngineError(f"{self.path}: called after its engine was closed")
        pinned = self._pinned
        tensors = [
            pinned[id(array)][1] if id(array) in pinned else _as_tensor(method, array) for array in inputs
        ]
        try:
            out = self._methods[method](tensors)
        except RuntimeError as error:
            raise EngineError(f"{self.path.name}: {method} failed for {width} rows: {error}") from error
        result: FloatArray = out[0].numpy()[0]
        return result

    def pin(self, *arrays: NDArray[Any]) -> None:
        """Check and wrap arrays once that will be handed in again and again, with other contents each time."""
        for array in arrays:
            self._pinned[id(array)] = array, _as_tensor("pin", array)

    def unpin(self) -> None:
        """Forget all pinned arrays."""
        self._pinned.clear()

    def close(self) -> None:
        """Free the weights and the K/V, whoever still holds this object. Idempotent; later calls are refused."""
        self._methods.clear()
        self._pinned.clear()
        self._program = None
        _LIVE.discard(self)

    def compact(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Move rows' K/V of all layers from slots to slots, in blocks of the widest batch.

        Args:
            sources: ascending slots.
            targets: as many ascending slots, none above its source, so that no block overwrites a later one's source.
        """
        import torch

        for start in range(0, len(sources), self._entry.max_width):
            block = slice(start, start + self._entry.max_width)
            moved = torch.tensor(list(sources[block])), torch.tensor([list(targets[block])])
            try:
                self._methods["compact"](list(moved))
            except RuntimeError as error:
                raise EngineError(f"{self.path.name}: compact failed: {error}") from error

    def write_record(self, path: Path) -> None:
        """Write the ETDump of what was called since the last time, and start a new one.

        Raises:
            EngineError: the program was loaded without `record`, or ExecuTorch was built without its event tracer.
        """
        try:
            self._program.write_etdump_result_to_file(str(path), str(path.with_suffix(".tensors")))
        except RuntimeError as error:
            raise EngineError(
                f"{self.path.name}: nothing was recorded: {error}",
                hint="profiles need a build of ExecuTorch with its event tracer, as its wheels have",
            ) from error


def method_names(path: Path) -> set[str]:
    """Names of a program's methods; nothing is loaded, so the program may be for another machine.

    Raises:
        BundleError: not a whole program.
        EngineError: ExecuTorch is missing or refuses the file.
    """
    check_header(path)
    try:
        return _method_names(_open(path, record=False))
    except (RuntimeError, MemoryError, ValueError) as error:
        raise EngineError(
            f"{path}: ExecuTorch cannot open it: {error}", hint="export the bundle again"
        ) from error


def _open(path: Path, *, record: bool) -> Any:
    library = native()
    with quiet_libraries():  # ExecuTorch writes its reasons to standard error
        return library._load_program(
            str(path),
            enable_etdump=record,
            program_verification=library.Verification.InternalConsistency,
        )


def _method_names(program: Any) -> set[str]:
    return {program.get_method_name(index) for index in range(program.num_methods())}


def _as_tensor(method: str, array: NDArray[Any]) -> Any:
    """A tensor over an array's memory.

    Raises:
        EngineError: it is not contiguous.
    """
    import torch

    if not array.flags.c_contiguous:
        raise EngineError(f"{method}: an input is not contiguous")
    return torch.from_numpy(array)


def set_threads(count: int) -> None:
    """Threads of ExecuTorch's pool, one for the whole process; loaded programs hold on to it.

    Raises:
        EngineError: programs are loaded that use another number.
    """
    library = native()
    with quiet_libraries():
        present = library._threadpool_get_thread_count()
    if present == count:
        return
    if _LIVE:
        gc.collect()  # a model that nobody closed or holds may wait for it
    if _LIVE:
        raise EngineError(
            f"{count} threads: models that use {present} are open in this process, and ExecuTorch has one pool",
            hint="open all models with the same number, or close the others first",
        )
    with quiet_libraries():
        library._unsafe_reset_threadpool(count)


def check_header(path: Path) -> int:
    """Refuse what is not a whole program before ExecuTorch sees it.

    Returns:
        Bytes of the flatbuffer that the file begins with.

    Raises:
        BundleError: naming what is wrong.
    """
    try:
        with path.open("rb") as stream:
            head, size = stream.read(_HEADER.size), os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error}", hint="export the bundle again") from error
    identifier, magic, program, offset, rest = _HEADER.unpack(head.ljust(_HEADER.size, b"\0"))
    if (identifier, magic) != (_IDENTIFIER, _MAGIC):
        raise BundleError(f"{path}: not an ExecuTorch program", hint="export the bundle again")
    stated = offset + rest if offset else program
    if stated != size or (offset and program > offset):
        raise BundleError(
            f"{path}: {size} bytes, its header states {program} and {rest} from {offset} on",
            hint="the file is damaged; copy or export the bundle again",
        )
    return int(program)
