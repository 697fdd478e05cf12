from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import T5ForConditionalGeneration

from skipstone.exporters.tune.alignment import NOWHERE, align, alignment_loss
from skipstone.exporters.tune.seq2seq import Seq2SeqNet


@pytest.mark.parametrize(
    ("source", "target", "places"),
    [
        ("abcd", "abcd", [0, 1, 2, 3]),
        ("abcd", "abXd", [0, 1, 2, 3]),  # replaced
        ("abcd", "abd", [0, 1, 3]),  # dropped
        ("abcd", "abXcd", [0, 1, NOWHERE, 2, 3]),  # put in
        ("abcd", "aXYd", [0, 1, 2, 3]),  # two for two, in order
        ("abcd", "aXYZd", [0, 1, 2, 2, 3]),  # three for two: the last has what is left
        ("abcd", "aXd", [0, 1, 3]),  # one for two
        ("", "ab", [NOWHERE, NOWHERE]),
        ("ab", "", []),
    ],
)
def test_targets_are_aligned_with_what_they_stand_for(source: str, target: str, places: list[int]) -> None:
    assert align(source.encode(), target.encode()) == places


@given(source=st.lists(st.integers(0, 3), max_size=20), target=st.lists(st.integers(0, 3), max_size=20))
def test_every_target_has_a_place_in_the_source_or_none_and_they_rise(
    source: list[int], target: list[int]
) -> None:
    places = align(source, target)
    known = [place for place in places if place != NOWHERE]
    assert len(places) == len(target)
    assert known == sorted(known)
    assert all(0 <= place < len(source) for place in known)


def test_the_loss_is_that_of_the_attention_which_the_first_head_pays(
    tiny_t5: T5ForConditionalGeneration, pair_batch: dict[str, torch.Tensor]
) -> None:
    """Transformers' own attention weights are the oracle."""
    model = tiny_t5.eval()
    model.set_attn_implementation("eager")
    labels, mask = pair_batch["labels"], pair_batch["attention_mask"]
    rows, length = labels.shape
    places = torch.arange(length).expand(rows, length) % mask.sum(1, keepdim=True)
    places = places.masked_fill(torch.arange(length) % 3 == 2, NOWHERE)
    weights = [layer[:, 0] for layer in model(**pair_batch, output_attentions=True).cross_attentions]
    told = places != NOWHERE
    expected = [
        -layer.gather(2, places.clamp(min=0).unsqueeze(2)).squeeze(2)[told].log().mean() for layer in weights
    ]
    net = Seq2SeqNet(model, (0.0,) * len(expected), alignment_weight=0.5).eval()
    losses = net(**pair_batch, alignment=places)
    torch.testing.assert_close(losses.alignment, 0.5 * torch.stack(expected).mean())
    torch.testing.assert_close(losses.final, net(**pair_batch).final)
    assert net(**pair_batch).alignment == 0


def test_a_batch_without_any_place_has_no_loss(tiny_t5: T5ForConditionalGeneration) -> None:
    states = torch.randn(2, 3, tiny_t5.config.d_model)
    cross = tiny_t5.decoder.block[0].layer[1]
    nowhere = torch.full((2, 3), NOWHERE)
    loss = alignment_loss(cross, states, states, torch.zeros(2, 1, 1, 3), nowhere)
    torch.testing.assert_close(loss, torch.zeros(()))


def test_training_on_alignments_turns_the_head_to_them(tiny_t5: T5ForConditionalGeneration) -> None:
    torch.manual_seed(0)
    net = Seq2SeqNet(tiny_t5, (0.0, 0.0, 0.0), alignment_weight=1.0)
    sources = torch.randint(2, 100, (16, 6))
    batch = {"input_ids": sources, "attention_mask": torch.ones_like(sources), "labels": sources}
    places = torch.arange(6).expand(16, 6)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    found = []
    for _ in range(60):
        losses = net(**batch, alignment=places)
        optimizer.zero_grad()
        (losses.final + losses.alignment).backward()
        optimizer.step()
        found.append(losses.alignment.item())
    assert found[-1] < 0.5 * found[0]
