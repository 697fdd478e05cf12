"""A program that was never opened here is opened and called in a process of its own first.

ExecuTorch checks a file's layout but trusts what stands in it: about one in twenty of the bytes that describe the
methods, changed, makes it abort instead of refuse. The hash in the manifest finds changes that happen to a file, not
those made together with the manifest. So a program's first opening takes a few seconds more; after that its hash is
known to the user's cache.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import signal
import subprocess
import sys
from pathlib import Path

from skipstone.bundle import Bundle, ExecuTorchManifest, manifest_of, open_bundle
from skipstone.errors import BundleError, SkipstoneError
from skipstone.runtimes.rows import ROOT
from skipstone.runtimes.session import Session
from skipstone.runtimes.user_cache import cache_folder

_CHILD = f"import sys; from {__name__} import main; sys.exit(main(sys.argv[1]))"
_SOUND, _REFUSED = 0, 3
_WINDOWS_FAULT = 0xC0000000


def rehearse(bundle: Bundle) -> None:
    """Make sure that the program does not kill the process that runs it; what it refuses is left to the caller to meet.

    Raises:
        BundleError: the rehearsing process died.
    """
    mark = _mark(bundle)
    if mark.is_file():
        return
    command = [sys.executable, "-c", _CHILD, str(bundle.path)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode < 0 or done.returncode >= _WINDOWS_FAULT:
        raise BundleError(
            f"{bundle.file(manifest_of(bundle, ExecuTorchManifest).program.file)}: ExecuTorch dies of it "
            f"({_reason(done.returncode)})",
            hint="the file is damaged, or made for another release; export the bundle again",
        )
    if done.returncode == _SOUND:
        with contextlib.suppress(OSError):  # without a cache it is rehearsed every time
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()


def main(folder: str) -> int:
    """What the rehearsing process does: a source if it takes one, a prompt, a tree to every exit, a branch committed."""
    from skipstone.runtimes.engines import EngineOptions
    from skipstone.runtimes.engines.executorch.engine import ExecuTorchEngine

    try:
        bundle = open_bundle(folder, verify_hashes=False)
        engine = ExecuTorchEngine(bundle, EngineOptions(threads=1), rehearsed=True)
        with Session(engine) as session:
            if engine.encoder is not None:
                session.encode([0] * engine.encoder.max_source_length)
            session.prefill([0] * min(session.max_width, session.context_length // 2))
            first, second = session.push([0, 1], [ROOT, ROOT])
            rows = [first, second, *session.push([0], [second])]
            for exit_layer in session.exits:
                if exit_layer == session.exits[-1] or engine.draft_vocabulary is not None:
                    session.advance(rows, exit_layer)
            session.commit(rows[-1])
    except SkipstoneError:
        return _REFUSED
    return _SOUND


def _mark(bundle: Bundle) -> Path:
    """An empty file that stands for a program known to be sound with this ExecuTorch."""
    name = manifest_of(bundle, ExecuTorchManifest).program.file
    (sha256,) = (entry.sha256 for entry in bundle.manifest.files if entry.path == name)
    try:
        version = importlib.metadata.version("executorch")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    return cache_folder() / "trust" / f"{sha256}-executorch-{version}"


def _reason(status: int) -> str:
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"exit code {status:#x}"
