"""The losses of learning from another model, against transformers' own forward pass and torch's own KL."""

import copy

import pytest
import torch
from torch.nn import functional
from transformers import LlamaForCausalLM, T5ForConditionalGeneration

from skipstone.exporters.tune.distillation import DistillationNet, Lesson
from skipstone.exporters.tune.objective import LayerSkipNet
from skipstone.exporters.tune.seq2seq import Seq2SeqNet

_NONE = (0.0,) * 4


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """A copy with other weights."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return other


def divergence(logits: torch.Tensor, expected: torch.Tensor, temperature: float) -> torch.Tensor:
    """T² KL(expected ‖ found) per row, of logits [n, vocabulary]."""
    found, target = ((part / temperature).log_softmax(-1) for part in (logits, expected))
    return temperature**2 * functional.kl_div(found, target, log_target=True, reduction="batchmean")


@pytest.mark.parametrize(("temperature", "distil"), [(1.0, 1.0), (2.0, 1.0), (2.0, 0.6)])
def test_a_decoders_losses_are_those_of_the_definitions(
    tiny_model: LlamaForCausalLM, tokens: torch.Tensor, temperature: float, distil: float
) -> None:
    dense = moved(tiny_model)
    inputs, labels = tokens[:, :-1], tokens[:, 1:].clone()
    labels[1, 25:] = -100
    counted = labels >= 0
    net = DistillationNet(
        LayerSkipNet(tiny_model, _NONE),
        LayerSkipNet(dense, _NONE),
        matched=((1, 2),),
        lesson=Lesson(temperature, hidden=0.5),
    )
    losses = net.train()(inputs, labels, exits=(2,), distil=distil)
    found = tiny_model(inputs, output_hidden_states=True)
    expected = dense(inputs, output_hidden_states=True)
    exit_logits = tiny_model.lm_head(tiny_model.model.norm(found.hidden_states[2]))
    for loss, logits in ((losses.final, found.logits), (losses.exits, exit_logits)):
        soft = divergence(logits[counted], expected.logits[counted], temperature)
        hard = functional.cross_entropy(logits[counted], labels[counted])
        torch.testing.assert_close(loss, distil * soft + (1 - distil) * hard, rtol=1e-4, atol=1e-5)
    # transformers gives the last state behind the final norm, so the last pair comes from the net itself
    own, theirs = (part.hidden_states(inputs, ())[0] for part in (net.student, net.teacher))
    pairs = ((found.hidden_states[1], expected.hidden_states[2]), (own, theirs))
    distances = [((a - b) ** 2).sum(-1)[counted] / (b**2).sum(-1)[counted] for a, b in pairs]
    mean = torch.stack([part.mean() for part in distances]).mean()
    torch.testing.assert_close(losses.alignment, 0.5 * mean, rtol=1e-3, atol=1e-5)


def test_every_exit_and_no_teacher_takes_gradients(
    tiny_model: LlamaForCausalLM, tokens: torch.Tensor
) -> None:
    dense = moved(tiny_model)
    net = DistillationNet(LayerSkipNet(tiny_model, _NONE), LayerSkipNet(dense, _NONE), lesson=Lesson())
    net.train()(tokens[:, :-1], tokens[:, 1:], exits=(1,)).exits.backward()
    reached = [any(p.grad is not None for p in layer.parameters()) for layer in tiny_model.model.layers]
    assert reached == [True, False, False, False]
    assert all(parameter.grad is None for parameter in dense.parameters())
    assert not net.teacher.training


def test_an_encoder_decoders_losses_are_those_of_the_definitions(
    tiny_t5: T5ForConditionalGeneration, pair_batch: dict[str, torch.Tensor]
) -> None:
    dense = moved(tiny_t5)
    net = DistillationNet(
        Seq2SeqNet(tiny_t5, _NONE), Seq2SeqNet(dense, _NONE), matched=((1, 1),), lesson=Lesson(hidden=1.0)
    )
    with torch.no_grad():
        losses = net.eval()(**pair_batch, exits=(2,))
    counted = pair_batch["labels"] >= 0
    found, expected = (model(**pair_batch) for model in (tiny_t5, dense))
    kl = divergence(found.logits[counted], expected.logits[counted], 1.0)
    torch.testing.assert_close(losses.final, kl, rtol=1e-4, atol=1e-5)
    assert float(losses.exits) > 0.0
    assert float(losses.alignment) > 0.0
    same = DistillationNet(
        Seq2SeqNet(dense, _NONE), Seq2SeqNet(dense, _NONE), matched=((1, 1),), lesson=Lesson(hidden=1.0)
    )
    with torch.no_grad():
        none = same.eval()(**pair_batch)
    assert abs(float(none.final)) < 1e-5
    assert float(none.alignment) == 0.0
