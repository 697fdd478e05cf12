"""ExecuTorch's runtime library, its operators registered.

    >>> native()._get_registered_backend_names()
    ['XnnpackBackend', …]

The package's own way in, `executorch.runtime`, imports its exporter and torch's compiler besides: seconds at every
start. This goes to the extension module beneath, which the pinned release of ExecuTorch holds still.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

from skipstone.errors import EngineError
from skipstone.runtimes.quiet import quiet_libraries

_INSTALL = 'install the engine with `pip install "skipstone[executorch]"`'
_OPERATORS = (
    "extension/llm/custom_ops/*custom_ops_aot_lib.*",
    "kernels/quantized/*quantized_ops_aot_lib.*",
)


@functools.cache
def native() -> Any:
    """The extension module.

    Raises:
        EngineError: ExecuTorch is missing or cannot be loaded.
    """
    try:
        with quiet_libraries():
            import torch
            from executorch.extension.pybindings import _C

            for library in _operator_libraries():
                torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
            _keep_mkl_to_one_thread(torch)
    except (ImportError, OSError) as error:
        raise EngineError(f"ExecuTorch cannot be loaded: {error}", hint=_INSTALL) from error
    return _C


def _operator_libraries() -> list[Path]:
    """The libraries of the operators that our programs use beside the portable ones."""
    spec = importlib.util.find_spec("executorch")
    roots = [Path(root) for root in (spec.submodule_search_locations or ())] if spec is not None else []
    found = []
    for pattern in _OPERATORS:
        matches = [match for root in roots for match in root.glob(pattern)]
        if not matches:
            raise ImportError(f"the package executorch has no {pattern}")
        found.append(matches[0])
    return found


def _keep_mkl_to_one_thread(torch: Any) -> None:
    """ExecuTorch's attention calls torch's matrix product from its own threads.

    Left alone, each of those opens a team of OpenMP threads that wait for each other spinning: a fifth of the speed on
    idle cores, and next to none on busy ones. It goes through MKL, whose count holds for the process and at any time.
    """
    with contextlib.suppress(OSError, AttributeError):  # a build of torch without MKL
        library = Path(str(torch.__file__)).parent / "lib" / "libtorch_cpu.so"
        ctypes.CDLL(str(library)).mkl_serv_set_num_threads(1)
