"""What every record of a manifest is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Frozen, closed record: an unknown key is an error, not a silent loss."""

    model_config = ConfigDict(frozen=True, extra="forbid")
