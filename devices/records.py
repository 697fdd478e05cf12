"""What `auto` has learned of a bundle on a machine, kept for the next process.

    >>> kept = KeptRecord(bundle, key)
    >>> kept.record                             # {} the first time
    >>> kept.update(policy.record)              # after a generation; written now and then
    >>> kept.save()

A record lies beside the cost curve, in a file named after the same key (`skipstone.devices.curves.CurveKey`): on another
machine, with other threads or artefacts, drafting may pay elsewhere, and is learned anew. It holds counts of rounds and
tokens and their price, and nothing of the texts. Deleting it is safe.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from skipstone.bundle import Bundle
from skipstone.devices.curves import CurveKey
from skipstone.devices.kept import keep_text, kept_contents
from skipstone.runtimes.policies.arms import Record

_EVERY_SECONDS = 30.0
_Sum = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Sums(BaseModel):
    """A `Record` as it lies in the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rounds: _Sum
    tokens: _Sum
    price: _Sum
    text_tokens: _Sum = 0.0
    text_price: _Sum = 0.0


class _File(BaseModel):
    """The file. `ways` are by their drafters' names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["skipstone draft records"] = "skipstone draft records"
    schema_version: Literal[1] = 1
    key: CurveKey
    ways: dict[str, _Sums]


class KeptRecord:
    """What was known when this process began, and what it has learned since.

    Args:
        bundle: whose folder holds the file.
        key: of its cost curve.

    Attributes:
        record: by the drafters' names.
    """

    def __init__(self, bundle: Bundle, key: CurveKey) -> None:
        self._bundle, self._key = bundle, key
        self.record: dict[str, Record] = kept_records(bundle, key)
        self._saved, self._saved_at = dict(self.record), time.monotonic()

    def update(self, record: Mapping[str, Record]) -> None:
        """Take in what a policy knows now; it reaches the disk at most every half minute, and with `save`."""
        self.record |= record
        if time.monotonic() - self._saved_at >= _EVERY_SECONDS:
            self.save()

    def save(self) -> None:
        """Write what is new, if anything is."""
        if self.record != self._saved:
            keep_records(self._bundle, self._key, self.record)
            self._saved = dict(self.record)
        self._saved_at = time.monotonic()


def kept_records(bundle: Bundle, key: CurveKey) -> dict[str, Record]:
    """By the drafters' names; empty where nothing was kept, or what was is damaged, newer or of another machine."""
    for _, found in kept_contents(bundle, _name(key), _File):
        if found.key == key:
            return {name: Record(**sums.model_dump()) for name, sums in found.ways.items()}
    return {}


def keep_records(bundle: Bundle, key: CurveKey, records: Mapping[str, Record]) -> None:
    """Keep them in place of earlier ones. A disk that takes no file is no error: the next process begins anew."""
    ways = {
        name: _Sums(**{figure: round(total, 3) for figure, total in asdict(one).items()})
        for name, one in records.items()
        if one.rounds
    }
    if ways:
        keep_text(bundle, _name(key), _File(key=key, ways=ways).model_dump_json(indent=2) + "\n")


def _name(key: CurveKey) -> str:
    return f"drafts-{key.digest}.json"
