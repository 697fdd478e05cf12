"""Arm's tools in a folder of their own: vela, which compiles, and TOSA's reference model, which computes.

TOSA's package asks for an older numpy than ours without needing it, so the tools are kept out of the environment:

    pip install --upgrade --no-deps --target FOLDER ethos-u-vela==5.1.0 tosa-tools==2026.5.0
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from skipstone.errors import ExportError
from skipstone.runtimes.quiet import no_output, quiet_libraries
from skipstone.runtimes.user_cache import cache_folder

VELA, TOSA = "5.1.0", "2026.5.0"
_PACKAGES = {"ethos-u-vela": VELA, "tosa-tools": TOSA}
_TOOLS = ("ethosu.vela.vela", "tosa.TosaGraph", "tosa_serializer", "tosa_reference_model")
_EXECUTORCH = ("executorch.exir", "executorch.backends.arm.quantizer", "executorch.backends.arm.ethosu")


def load_tools() -> None:
    """Make the tools importable, and ExecuTorch's part that calls them; what the environment has itself comes first.

    Raises:
        ExportError: they are missing, do not load, or are of other versions; the hint installs them.
    """
    folder = cache_folder() / "ethos-u"
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    importlib.invalidate_caches()  # they may have been installed since the last time
    versions = " ".join(f"{name}=={version}" for name, version in _PACKAGES.items())
    hint = f'`pip install --upgrade --no-deps --target "{folder}" {versions}`'
    _load(_TOOLS, "Arm's tools for Ethos-U are not there", hint)
    for name, version in _PACKAGES.items():
        found = importlib.metadata.version(name)
        if found != version:
            raise ExportError(f"{name} is {found}, {version} was expected", hint=hint)
    _load(_EXECUTORCH, "ExecuTorch does not load", '`pip install "skipstone[export,executorch,onnx]"`')


def tool(name: str) -> Any:
    """A module of theirs, behind `load_tools`."""
    return importlib.import_module(name)


@contextlib.contextmanager
def quiet_tools(printed: io.StringIO) -> Iterator[None]:
    """Keep off the terminal what they write: what Python prints goes to `printed`, the rest, from C++, nowhere."""
    with quiet_libraries(), no_output(), contextlib.redirect_stdout(printed):
        yield


def _load(names: Sequence[str], problem: str, hint: str) -> None:
    try:
        with quiet_libraries():
            for name in names:
                importlib.import_module(name)
    except ImportError as error:
        raise ExportError(f"{problem}: {error}", hint=hint) from error
