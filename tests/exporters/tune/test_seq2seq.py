from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import LlamaForCausalLM, T5ForConditionalGeneration

from skipstone.errors import SkipstoneError
from skipstone.exporters.tune.pairs import NO_TARGET
from skipstone.exporters.tune.seq2seq import Seq2SeqNet, scale_residual_projections, shifted

NO_DROPOUT = (0.0,) * 3


def oracle_logits(
    model: T5ForConditionalGeneration, batch: dict[str, torch.Tensor], *, layers: int, encoder_layers: int = 4
) -> torch.Tensor:
    """Logits of transformers' own forward with the stacks cut to their first layers."""
    whole = model.encoder.block, model.decoder.block
    model.encoder.block, model.decoder.block = whole[0][:encoder_layers], whole[1][:layers]
    try:
        return model(**batch).logits
    finally:
        model.encoder.block, model.decoder.block = whole


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=NO_TARGET)


def test_the_loss_of_the_whole_model_is_transformers_own(
    tiny_t5: T5ForConditionalGeneration, pair_batch: dict[str, torch.Tensor]
) -> None:
    losses = Seq2SeqNet(tiny_t5, NO_DROPOUT).eval()(**pair_batch)
    torch.testing.assert_close(losses.final, tiny_t5(**pair_batch).loss)
    assert losses.exits == 0


def test_exits_have_the_losses_of_decoders_cut_there(
    tiny_t5: T5ForConditionalGeneration, pair_batch: dict[str, torch.Tensor]
) -> None:
    losses = Seq2SeqNet(tiny_t5, NO_DROPOUT).eval()(**pair_batch, exits=(1, 2))
    cut = [cross_entropy(oracle_logits(tiny_t5, pair_batch, layers=n), pair_batch["labels"]) for n in (1, 2)]
    torch.testing.assert_close(losses.exits, cut[0] + cut[1])
    assert abs(cut[0] - cut[1]) > 0.01


def test_a_distilled_exit_is_drawn_to_the_last_layer_over_real_targets_alone(
    tiny_t5: T5ForConditionalGeneration, pair_batch: dict[str, torch.Tensor]
) -> None:
    labels = pair_batch["labels"]
    real = labels.flatten() != NO_TARGET
    student, teacher = (
        functional.log_softmax(oracle_logits(tiny_t5, pair_batch, layers=n), -1).flatten(0, 1)[real]
        for n in (2, 3)
    )
    divergence = functional.kl_div(student, teacher, log_target=True, reduction="batchmean")
    entropy = -(teacher.exp() * teacher).sum(-1).mean()
    data = functional.nll_loss(student, labels.flatten()[real])
    losses = Seq2SeqNet(tiny_t5, NO_DROPOUT).eval()(**pair_batch, exits=(2,), distil=0.6)
    torch.testing.assert_close(losses.exits, 0.4 * data + 0.6 * (divergence + entropy))


@pytest.mark.parametrize("exit_layer", [1, 3])
def test_an_encoder_exit_is_an_encoder_cut_there(
    tiny_t5: T5ForConditionalGeneration, pair_batch: dict[str, torch.Tensor], exit_layer: int
) -> None:
    net = Seq2SeqNet(tiny_t5, NO_DROPOUT).eval()
    mask = pair_batch["attention_mask"]
    source = net.encode(pair_batch["input_ids"], mask, exit_layer=exit_layer)
    logits = net.logits(net.hidden_states(source, mask, pair_batch["labels"], ())[-1])
    expected = oracle_logits(tiny_t5, pair_batch, layers=3, encoder_layers=exit_layer)
    torch.testing.assert_close(logits, expected)


def test_a_share_of_the_sequences_stops_at_each_encoder_exit(tiny_t5: T5ForConditionalGeneration) -> None:
    torch.manual_seed(0)
    net = Seq2SeqNet(tiny_t5, NO_DROPOUT, encoder_exits=(1, 3), encoder_share=0.4)
    ids = torch.randint(2, 300, (1, 6)).expand(500, 6)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        whole = net.eval().encode(ids[:1], mask[:1])
        stopped = {n: net.encode(ids[:1], mask[:1], exit_layer=n) for n in (1, 3)}
        mixed = net.train().encode(ids, mask)

    def share(output: torch.Tensor) -> float:
        return torch.isclose(mixed, output, atol=1e-5).all(dim=(1, 2)).double().mean().item()

    margin = 4 * (0.4 * 0.6 / 500) ** 0.5
    assert share(whole) == pytest.approx(0.6, abs=margin)
    assert share(stopped[1]) == pytest.approx(0.2, abs=margin)
    assert share(stopped[3]) == pytest.approx(0.2, abs=margin)


def test_decoder_layers_are_dropped_in_training_and_not_in_evaluation(
    tiny_t5: T5ForConditionalGeneration, pair_batch: dict[str, torch.Tensor]
) -> None:
    net = Seq2SeqNet(tiny_t5, (0.0, 1.0, 0.0))
    mask, labels = pair_batch["attention_mask"], pair_batch["labels"]
    with torch.no_grad():
        source = net.eval().encode(pair_batch["input_ids"], mask)
        first, second, _ = net.train().hidden_states(source, mask, labels, (1, 2))
        assert torch.equal(first, second)
        first, second, _ = net.eval().hidden_states(source, mask, labels, (1, 2))
        assert not torch.equal(first, second)


def test_the_padding_of_sources_changes_nothing(
    tiny_t5: T5ForConditionalGeneration, pair_batch: dict[str, torch.Tensor]
) -> None:
    net = Seq2SeqNet(tiny_t5, NO_DROPOUT).eval()
    wider = {
        "input_ids": functional.pad(pair_batch["input_ids"], (0, 5), value=7),
        "attention_mask": functional.pad(pair_batch["attention_mask"], (0, 5)),
        "labels": functional.pad(pair_batch["labels"], (0, 3), value=NO_TARGET),
    }
    plain, padded = net(**pair_batch, exits=(1,)), net(**wider, exits=(1,))
    torch.testing.assert_close(padded.final, plain.final)
    torch.testing.assert_close(padded.exits, plain.exits)


def test_decoder_inputs_begin_with_the_start_token_and_have_no_gaps() -> None:
    labels = torch.tensor([[5, 6, 1], [7, 1, NO_TARGET]])
    assert shifted(labels, 0).tolist() == [[0, 5, 6], [0, 7, 1]]


def test_only_projections_into_the_residual_streams_are_scaled_at_the_start(
    tiny_t5: T5ForConditionalGeneration,
) -> None:
    before = {name: parameter.detach().clone() for name, parameter in tiny_t5.named_parameters()}
    scale_residual_projections(tiny_t5)
    for name, parameter in tiny_t5.named_parameters():
        # Two projections in each of four encoder layers, three in each of three decoder layers.
        factor = 8**-0.5 if name.startswith("encoder") else 9**-0.5
        residual = name.endswith((".o.weight", ".wo.weight"))
        torch.testing.assert_close(parameter.detach(), before[name] * (factor if residual else 1.0))


def test_a_model_without_an_encoder_is_refused_by_name(tiny_model: LlamaForCausalLM) -> None:
    with pytest.raises(SkipstoneError, match=r"LlamaForCausalLM has no shared, encoder"):
        Seq2SeqNet(tiny_model, NO_DROPOUT)


def test_an_encoder_exit_at_the_last_layer_is_refused(tiny_t5: T5ForConditionalGeneration) -> None:
    with pytest.raises(SkipstoneError, match=r"encoder_exits: exit 4"):
        Seq2SeqNet(tiny_t5, NO_DROPOUT, encoder_exits=(2, 4))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch's compiler warns of its own parts
def test_compiled_parts_give_the_losses_of_uncompiled_ones(
    tiny_t5: T5ForConditionalGeneration, pair_batch: dict[str, torch.Tensor]
) -> None:
    plain = Seq2SeqNet(tiny_t5, NO_DROPOUT)(**pair_batch, exits=(1,), distil=0.5)
    compiled = Seq2SeqNet(tiny_t5, NO_DROPOUT, compile_parts=True)(**pair_batch, exits=(1,), distil=0.5)
    torch.testing.assert_close(compiled.final, plain.final)
    torch.testing.assert_close(compiled.exits, plain.exits)
