"""Learning from another model: its distributions and hidden states, at the last layer and at every exit.

>>> net = DistillationNet(LayerSkipNet(model, rates), LayerSkipNet(dense, no_rates), matched=((1, 2),), lesson=Lesson())
>>> losses = net(input_ids, labels, exits=(1,))  # losses.final, losses.exits and losses.alignment
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from skipstone.exporters.tune.objective import ExitLosses, LayerSkipNet, exit_loss, final_loss

if TYPE_CHECKING:
    from skipstone.exporters.tune.seq2seq import Seq2SeqNet

_SMALL = 1e-6


@dataclass(frozen=True)
class Lesson:
    """What is learned from the teacher.

    Attributes:
        temperature: of both distributions, which soften as it grows (https://arxiv.org/abs/1503.02531).
        hidden: weight of the hidden states' loss.
    """

    temperature: float = 1.0
    hidden: float = 0.0


class _Run(NamedTuple):
    """What a model computes of a batch.

    Attributes:
        states: hidden states [batch, length, width] by number of layers run; the last layer's under None.
        source: an encoder's output; None for a decoder alone.
    """

    states: dict[int | None, Tensor]
    source: Tensor | None


class DistillationNet(nn.Module):
    """A student with exits, and the teacher whose last layer all of them learn from.

    The student's last layer and exits get KL(teacher ‖ student), as an exit drafts for the last layer. A hidden state's
    loss is its squared distance from the teacher's in parts of the latter's square, so that layers and tokens count
    alike. The teacher runs without layer dropout and takes no gradients.
    """

    def __init__(
        self,
        student: LayerSkipNet | Seq2SeqNet,
        teacher: LayerSkipNet | Seq2SeqNet,
        *,
        matched: tuple[tuple[int, int], ...] = (),
        lesson: Lesson,
        compile_parts: bool = False,
    ) -> None:
        """`matched` pairs numbers of layers run: the student's, and the teacher's that should give the same states."""
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.matched = matched
        self.lesson = lesson
        self._exit_loss = torch.compile(exit_loss, dynamic=False) if compile_parts else exit_loss

    @property
    def model(self) -> Any:
        """The student's checkpoint model."""
        return self.student.model

    def train(self, mode: bool = True) -> Self:
        """Set the student's mode; the teacher is never trained."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        exits: tuple[int, ...] = (),
        distil: float = 1.0,
    ) -> ExitLosses:
        """Losses for a batch, int64 [batch, length] each.

        A decoder reads `input_ids` and predicts `labels`; an encoder reads `input_ids`, padded where `attention_mask` is
        0, and its decoder predicts `labels`, which it also reads. Negative labels do not count. `distil` is the
        teacher's share in the targets, the rest is the labels'.
        """
        batch = (input_ids, labels, attention_mask)
        found = _run(self.student, batch, {*exits, *(own for own, _ in self.matched)})
        with torch.no_grad():
            expected = _run(self.teacher, batch, {theirs for _, theirs in self.matched})
            targets = labels.reshape(-1)
            soft = self._soft_targets(expected, targets)
            entropy = _mean(torch.special.entr(soft.float()).sum(-1), targets >= 0)
        losses = [self._loss(found.states[place], targets, soft, entropy, distil) for place in (None, *exits)]
        total = torch.stack(losses[1:]).sum() if exits else torch.zeros_like(losses[0])
        return ExitLosses(
            losses[0],
            total,
            self.lesson.hidden * self._distance(found, expected, labels >= 0, attention_mask),
        )

    def _soft_targets(self, expected: _Run, targets: Tensor) -> Tensor:
        """The teacher's distributions [batch * length, vocabulary] at the temperature."""
        norm, head, scale = _exit_of(self.teacher)
        state = expected.states[None]
        return final_loss(norm, head, state, targets, scale / self.lesson.temperature)[1]

    def _loss(self, state: Tensor, targets: Tensor, soft: Tensor, entropy: Tensor, distil: float) -> Tensor:
        """T² · KL(teacher ‖ student) at temperature T, and the cross-entropy of the labels, mixed by `distil`."""
        norm, head, scale = _exit_of(self.student)
        temperature = self.lesson.temperature
        whole, none = (torch.tensor(share, device=state.device) for share in (1.0, 0.0))
        loss = self._exit_loss(norm, head, state, targets, soft, whole, scale / temperature) - entropy
        loss = distil * temperature**2 * loss
        if distil < 1.0:
            loss = loss + (1 - distil) * self._exit_loss(norm, head, state, targets, soft, none, scale)
        return loss

    def _distance(self, found: _Run, expected: _Run, counted: Tensor, mask: Tensor | None) -> Tensor:
        """How far the matched hidden states are from the teacher's: ‖h − t‖² / ‖t‖², a mean over tokens and layers."""
        if not self.lesson.hidden:
            return torch.zeros((), device=counted.device)
        pairs = [
            (found.states[own], expected.states[theirs]) for own, theirs in (*self.matched, (None, None))
        ]
        parts = [_mean(_relative_square(*pair), counted) for pair in pairs]
        if found.source is not None and expected.source is not None:
            distances = _relative_square(found.source, expected.source)
            parts.append(distances.mean() if mask is None else _mean(distances, mask > 0))
        return torch.stack(parts).mean()


def _run(
    net: LayerSkipNet | Seq2SeqNet, batch: tuple[Tensor, Tensor, Tensor | None], wanted: set[int]
) -> _Run:
    """A batch through a model, keeping the hidden states after each number of layers in `wanted`."""
    input_ids, labels, mask = batch
    places = tuple(sorted(wanted))
    source = None
    if isinstance(net, LayerSkipNet):
        states = net.hidden_states(input_ids, places)
    else:
        mask = torch.ones_like(input_ids) if mask is None else mask
        source = net.encode(input_ids, mask)
        states = net.hidden_states(source, mask, labels, places)
    return _Run(dict(zip((*places, None), states, strict=True)), source)


def _exit_of(net: LayerSkipNet | Seq2SeqNet) -> tuple[nn.Module, nn.Module, float]:
    """Final norm, LM head, and the scale of what enters the head."""
    model: Any = net.model
    if isinstance(net, LayerSkipNet):
        return model.model.norm, model.lm_head, 1.0
    return model.decoder.final_layer_norm, model.lm_head, net.scale


def _relative_square(found: Tensor, expected: Tensor) -> Tensor:
    """‖h − t‖² / ‖t‖² by token: [batch, length]."""
    found, expected = found.float(), expected.float()
    return (found - expected).square().mean(-1) / (expected.square().mean(-1) + _SMALL)


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted, values, 0.0).sum() / counted.sum()
