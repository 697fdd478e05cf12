"""ONNX Runtime, imported when a bundle is opened."""

from __future__ import annotations

import importlib
from typing import Any

from skipstone.errors import EngineError


def runtime() -> Any:
    """The module `onnxruntime`.

    Raises:
        EngineError: it is not installed, or does not load.
    """
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime"
        reason = "is not installed" if missing else f"cannot be loaded: {error}"
        raise EngineError(
            f"onnxruntime {reason}", hint='install it with `pip install "skipstone[onnx]"`'
        ) from error


def first_line(error: BaseException) -> str:
    """What an error of ONNX Runtime's says, its first line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
