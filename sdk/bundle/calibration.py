"""What a bundle keeps of a calibration of early stopping (`skipstone.calibration`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Knob = Literal["early-exit-margin", "encoder-saturation"]
Risk = Literal["text", "quality"]


class Calibration(BaseModel):
    """One threshold and what was shown of it.

    `value` is that of the flag named `knob`; None: no value could be shown to keep the bound, so nothing stops early.
    The expected loss, `risk` by name, is at most `max_loss` with `confidence`; it was `mean_loss` over the `samples` of
    the file with this hash, each generated up to `max_new_tokens`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    knob: Knob
    value: Annotated[float, Field(ge=-1, le=1)] | None
    risk: Risk
    max_loss: Annotated[float, Field(gt=0, lt=1)]
    confidence: Annotated[float, Field(gt=0, lt=1)]
    mean_loss: Annotated[float, Field(ge=0, le=1)] | None
    samples: Annotated[int, Field(gt=0)]
    max_new_tokens: Annotated[int, Field(gt=0)]
    prompts_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
