"""Finding a quantisation scheme by the name a user gives; every format has schemes of its own."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

from skipstone.errors import UsageError

Scheme = TypeVar("Scheme")
_UNQUANTISED = ("none", "f32")


def find_scheme(
    name: str, schemes: Mapping[str, Scheme], *, format: str, docs: str, flag: str = "--quantize"
) -> Scheme:
    """The scheme of a name; `none` and `f32` are the same one, whichever of them the format lists.

    Args:
        name: as given, in any case.
        schemes: the format's, by name.
        format: its name, for the error.
        docs: page that lists them.
        flag: that the name was given with.

    Raises:
        UsageError: no such scheme; lists them.
    """
    wanted = name.lower()
    scheme = schemes.get(wanted)
    if scheme is None and wanted in _UNQUANTISED:
        scheme = next((schemes[other] for other in _UNQUANTISED if other in schemes), None)
    if scheme is None:
        near = difflib.get_close_matches(wanted, schemes, n=1)
        raise UsageError(
            f"{flag} {name}: unknown scheme for --format {format}, expected {', '.join(schemes)}",
            hint=f"did you mean {near[0]}?" if near else f"see {docs}",
        )
    return scheme
