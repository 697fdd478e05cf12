"""How well a model exits: loss and agreement with the last layer at every exit, on held-out text.

>>> report = evaluate_exits(net, held_out, length=512)
>>> report.exits[1].agreement  # exit 2: how often its argmax is the last layer's
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from skipstone.errors import SkipstoneError

if TYPE_CHECKING:
    from skipstone.exporters.tune.objective import LayerSkipNet


@dataclass(frozen=True)
class ExitFigures:
    """Held-out figures of one exit.

    Attributes:
        exit: layers run, the last exit being the whole model.
        loss: mean cross-entropy per token on the text, in nats.
        agreement: share of positions where the argmax is that of the last layer.
        accuracy: share of positions where the argmax is the text's next token.
        trained: whether the exit had a loss of its own in training.
    """

    exit: int
    loss: float
    agreement: float
    accuracy: float
    trained: bool


@dataclass(frozen=True)
class ExitReport:
    """Figures of every exit, in rising order, over the same `tokens` predicted held-out tokens.

    An encoder-decoder's `exits` are its decoder's, behind the whole encoder; `encoder_exits` are its encoder's, before
    the whole decoder.
    """

    tokens: int
    exits: tuple[ExitFigures, ...]
    encoder_exits: tuple[ExitFigures, ...] = ()

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> ExitReport:
        """Read what `save` wrote."""
        content = json.loads(path.read_text(encoding="utf-8"))
        exits, encoder_exits = (
            tuple(ExitFigures(**figures) for figures in content.get(part, ()))
            for part in ("exits", "encoder_exits")
        )
        return cls(content["tokens"], exits, encoder_exits)


def exit_figures(totals: Tensor, counted: int, trained: tuple[int, ...]) -> tuple[ExitFigures, ...]:
    """Figures from sums of loss, agreement and accuracy, [exits, 3], over `counted` tokens."""
    return tuple(
        ExitFigures(index + 1, loss, agreement, accuracy, trained=index + 1 in trained)
        for index, (loss, agreement, accuracy) in enumerate((totals / counted).tolist())
    )


def evaluate_exits(
    net: LayerSkipNet,
    tokens: npt.NDArray[np.unsignedinteger],
    *,
    length: int,
    batch_size: int = 8,
    max_windows: int = 256,
    trained: tuple[int, ...] = (),
) -> ExitReport:
    """Run every exit on up to `max_windows` windows of `length` tokens, spread evenly over `tokens`.

    Layer dropout is off meanwhile. Raises SkipstoneError when the text is shorter than one window.
    """
    layers = len(net.model.model.layers)
    totals = torch.zeros(layers, 3, dtype=torch.float64)
    counted = 0
    was_training = net.training
    net.eval()
    with torch.no_grad():
        for batch in _batches(tokens, length, batch_size, max_windows):
            totals += _batch_totals(net, batch.to(next(net.parameters()).device), layers)
            counted += batch.shape[0] * length
    net.train(was_training)
    return ExitReport(counted, exit_figures(totals, counted, trained))


def plot_exits(report: ExitReport, path: Path) -> None:
    """Draw loss and agreement over the exits to a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    stacks = {"decoder": report.exits, "encoder": report.encoder_exits}
    for axes, name, label in zip(
        figure.subplots(1, 2),
        ("loss", "agreement"),
        ("loss, nats per token", "agreement with the last layer"),
        strict=True,
    ):
        for (stack, exits), colour in zip(stacks.items(), ("tab:blue", "tab:green"), strict=True):
            chosen = [figures for figures in exits if figures.trained]
            stated = f"{stack}: exit trained" if report.encoder_exits else "exit trained"
            axes.plot([f.exit for f in exits], [getattr(f, name) for f in exits], color=colour, linewidth=1.5)
            if chosen:
                axes.plot(
                    [f.exit for f in chosen],
                    [getattr(f, name) for f in chosen],
                    "o",
                    color=colour,
                    label=stated,
                )
                axes.legend()
        layers = range(1, 1 + max(len(exits) for exits in stacks.values()))
        axes.set(xlabel="exit (layers run)", ylabel=label, xticks=layers)
        axes.grid(alpha=0.3)
    figure.suptitle(f"Exits on {report.tokens:,} held-out tokens")
    figure.savefig(path, dpi=120)


def _batches(
    tokens: npt.NDArray[np.unsignedinteger], length: int, batch_size: int, max_windows: int
) -> Iterator[Tensor]:
    available = (len(tokens) - 1) // length
    if available < 1:
        raise SkipstoneError(
            f"the held-out text has {len(tokens)} tokens, less than one sequence of {length}",
            hint="give more text, or lower corpus.held_out_modulus or training.sequence_length in the recipe",
        )
    chosen = np.linspace(0, available - 1, min(available, max_windows)).astype(int)
    for begin in range(0, len(chosen), batch_size):
        windows = [tokens[i * length : (i + 1) * length + 1] for i in chosen[begin : begin + batch_size]]
        yield torch.from_numpy(np.stack(windows).astype(np.int64))


def _batch_totals(net: LayerSkipNet, batch: Tensor, layers: int) -> Tensor:
    """Sums over a batch of loss, agreement and accuracy for each exit: float64 [layers, 3]."""
    decoder: Any = net.model
    states = net.hidden_states(batch[:, :-1], exits=tuple(range(1, layers)))
    targets = batch[:, 1:]
    last = decoder.lm_head(decoder.model.norm(states[-1])).float().argmax(-1)
    totals = torch.zeros(layers, 3, dtype=torch.float64)
    for index, state in enumerate(states):
        logits = decoder.lm_head(decoder.model.norm(state)).float()
        best = logits.argmax(-1)
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        sums = (loss, (best == last).sum(), (best == targets).sum())
        totals[index] = torch.tensor([float(value) for value in sums], dtype=torch.float64)
    return totals
