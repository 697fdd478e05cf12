"""What an evaluation found, for tables, JSON and pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from skipstone.benchmark.report import Machine
from skipstone.evaluation.pareto import pareto_front

if TYPE_CHECKING:
    from skipstone.exporters.evaluation.sums import Prediction
    from skipstone.exporters.tune.correction import CorrectionFigures

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Speed:
    """Measured on the report's machine, plain decoding and a strategy in turns.

    Attributes:
        plain: tokens per second after the first, plainly decoded.
        strategy: name of the other way to decode.
        tokens_per_second: its.
        speedup: over plain decoding, on the same tokens.
        identical, prompts: in how many of the prompts its output was plain decoding's.
    """

    plain: float
    strategy: str
    tokens_per_second: float
    speedup: float | None
    identical: int | None
    prompts: int


@dataclass(frozen=True)
class Row:
    """One bundle or checkpoint.

    Attributes:
        label: short name, different for every row.
        given: what the user named it by.
        format: the bundle's, or `checkpoint`, run in torch in float32.
        quantization: scheme; of a checkpoint the type that its weights are stored in.
        num_layers: of an encoder-decoder, the decoder's.
        parameters: stored weights.
        bytes: on disk, everything that is needed to run it.
        prediction: of the held-out text.
        correction: what an encoder-decoder wrote; None of a decoder alone.
        memory_mb: peak resident memory, MB (10^6 bytes), of a process that decodes plainly; None: not measured.
        speed: None: not measured.
    """

    label: str
    given: str
    format: str
    quantization: str
    num_layers: int
    parameters: int
    bytes: int
    prediction: Prediction
    correction: CorrectionFigures | None = None
    memory_mb: float | None = None
    speed: Speed | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """The faster of the two ways to decode that were measured."""
        return None if self.speed is None else max(self.speed.plain, self.speed.tokens_per_second)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        flat = {field.name: getattr(self, field.name) for field in fields(self)}
        nested = (self.correction, self.speed)
        correction, speed = (None if part is None else asdict(part) for part in nested)
        return flat | {"prediction": self.prediction.as_json(), "correction": correction, "speed": speed}


@dataclass(frozen=True)
class EvaluationReport:
    """Everything that a reader needs to judge the rows.

    Attributes:
        rows: in the order given.
        against: the dense model; None: the rows are compared with nothing.
        held_out, held_out_sha256: file name and hash of the text.
        windows, longest_window: how many stretches of it every model read, and their tokens at most.
        kv_type: type that K and V were kept in; None: every engine's usual one.
        uncorrected: figures of texts left as they are, of encoder-decoders.
        command: the command line.
        started: ISO time, UTC.
        machine: where it ran; speed and memory are this machine's.
    """

    rows: tuple[Row, ...]
    against: str | None
    held_out: str
    held_out_sha256: str
    windows: int
    longest_window: int
    kv_type: str | None
    uncorrected: CorrectionFigures | None
    command: tuple[str, ...]
    started: str
    machine: Machine

    @property
    def cost_name(self) -> str:
        """What quality is measured by: less is better."""
        return "perplexity" if self.against is None else "KL divergence from the dense model, nats"

    def cost(self, row: Row) -> float:
        """The figure that `cost_name` names."""
        divergence = row.prediction.kl_divergence
        return row.prediction.perplexity if divergence is None else divergence

    @property
    def size_front(self) -> tuple[int, ...]:
        """Rows that no other one beats in size and quality, the smallest first."""
        return self._front(lambda row: float(row.bytes))

    @property
    def speed_front(self) -> tuple[int, ...]:
        """Rows that no other one beats in speed and quality, the fastest first; none without speeds."""
        return self._front(lambda row: None if row.tokens_per_second is None else -row.tokens_per_second)

    def _front(self, figure: Callable[[Row], float | None]) -> tuple[int, ...]:
        known = [(index, found) for index, row in enumerate(self.rows) if (found := figure(row)) is not None]
        points = [(found, self.cost(self.rows[index])) for index, found in known]
        return tuple(known[place][0] for place in pareto_front(points))

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values, the fronts by the rows' labels."""
        flat = {field.name: getattr(self, field.name) for field in fields(self)}
        return (
            {"schema_version": SCHEMA_VERSION}
            | flat
            | {
                "rows": [row.as_json() for row in self.rows],
                "uncorrected": None if self.uncorrected is None else asdict(self.uncorrected),
                "machine": asdict(self.machine),
                "size_front": [self.rows[index].label for index in self.size_front],
                "speed_front": [self.rows[index].label for index in self.speed_front],
            }
        )


def labels(given: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart: `a/q8_0` and `b/q8_0`, but `q4_0`."""
    parts = [[part for part in name.split("/") if part not in ("", ".")] or [name] for name in given]
    found: list[str] = []
    for own in parts:
        length = 1
        while length < len(own) and sum(other[-length:] == own[-length:] for other in parts) > 1:
            length += 1
        found.append("/".join(own[-length:]))
    return found
