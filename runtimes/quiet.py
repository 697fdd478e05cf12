"""Silence for libraries that write to standard output and standard error from C++."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TextIO


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep warnings, log lines and what C++ writes to standard error off the terminal.

    The whole process's standard error is redirected meanwhile, so keep the block short. Exceptions still rise.
    """
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with _nowhere(sys.stderr, 2), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def no_output() -> Iterator[None]:
    """Keep what C++ writes to standard output out of the program's own; what Python prints, too."""
    with _nowhere(sys.stdout, 1):
        yield


@contextlib.contextmanager
def _nowhere(stream: TextIO, descriptor: int) -> Iterator[None]:
    stream.flush()
    kept, nowhere = os.dup(descriptor), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    try:
        yield
    finally:
        stream.flush()
        os.dup2(kept, descriptor)
        os.close(kept)
        os.close(nowhere)
