"""How a checkpoint was made smaller before it was exported: compression.json beside it, a section of a manifest."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, JsonValue

from skipstone.bundle.record import Record

Share = Annotated[float, Field(ge=0, le=1)]


class ExitAgreement(Record):
    """How one exit predicts: the share of positions with the same best token as the model's own last layer, and as the
    dense model has at its exit after layer `dense_exit`, which is the same place. None where there is no such place.
    """

    exit: Annotated[int, Field(gt=0)]
    own_last: Share
    dense_exit: int | None = None
    dense: Share | None = None


class Fidelity(Record):
    """How a model, computed in float32, predicts a text, beside the dense one: perplexity over `tokens` predicted
    tokens, mean divergence from the dense model's distribution (Kullback–Leibler, nats), share of positions with the
    same best token, and its exits, of an encoder-decoder the decoder's.
    """

    tokens: Annotated[int, Field(gt=0)]
    perplexity: float
    kl_divergence: float
    agreement: Share
    exits: tuple[ExitAgreement, ...] = ()


class ModelSize(Record):
    """Number of weights, those that are not zero, and bytes: of a weight with fixed codes in its storage layout, of
    others in the type that the checkpoint is stored in.
    """

    parameters: Annotated[int, Field(ge=0)]
    nonzero: Annotated[int, Field(ge=0)]
    num_bytes: Annotated[int, Field(ge=0)]


class CompressionStep(Record):
    """One step: what it was asked for, what it chose (`details`), what became of the model, and how long it took."""

    kind: str
    options: dict[str, JsonValue]
    details: dict[str, JsonValue]
    size: ModelSize
    fidelity: Fidelity | None
    seconds: Annotated[float, Field(ge=0)]


class Compression(Record):
    """What was done to a checkpoint, step by step.

    `fidelity` was measured on the text with the hash `measured_sha256`: held out if one was given, else the calibration
    text. `earlier` are steps that the source had gone through before. `kept` gives, by stack (`decoder`, `encoder`), the
    numbers that the layers had in the source.
    """

    source: str
    source_sha256: str
    calibration_sha256: str | None = None
    measured_sha256: str | None = None
    before: ModelSize
    before_fidelity: Fidelity | None = None
    earlier: tuple[CompressionStep, ...] = ()
    steps: tuple[CompressionStep, ...]
    kept: dict[str, tuple[int, ...]] = Field(default_factory=dict)
