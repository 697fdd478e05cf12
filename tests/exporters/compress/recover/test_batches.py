"""Which windows are trained on, and how they come in batches."""

import torch

from skipstone.exporters.checkpoint import load_eager
from skipstone.exporters.compress.recover.batches import Batches, choose_windows, cluster_rows
from skipstone.exporters.compress.work import Windows, silent
from tests.exporters.compress.test_activations import texts
from tests.exporters.conftest import MakeTiny


def test_every_window_comes_as_often_as_any_other_and_padding_has_no_target() -> None:
    text = Windows(tuple(texts((9, 5, 7))), None, "")
    batches = Batches(text, batch=2, steps=6, seed=0)
    rows = [row for index in range(len(batches)) for row in zip(*batches[index].values(), strict=True)]
    for window in text.windows:
        found = [labels for _, labels in rows if torch.equal(labels[labels >= 0], window[1:])]
        assert len(found) == 4
    for inputs, labels in rows:
        assert inputs.shape == labels.shape == (8,)
        assert any(torch.equal(inputs[labels >= 0], window[:-1]) for window in text.windows)


def test_sources_stay_with_their_targets() -> None:
    text = Windows(tuple(texts((6, 4))), tuple(texts((3, 5), 1)), "")
    batch = Batches(text, batch=2, steps=1, seed=0)[0]
    for source, mask, labels in zip(
        *(batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True
    ):
        number = 0 if int((labels >= 0).sum()) == 5 else 1
        assert text.sources is not None
        assert torch.equal(source[mask == 1], text.sources[number])
        assert torch.equal(labels[labels >= 0], text.windows[number][1:])


def test_rows_that_point_the_same_way_are_one_cluster() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(3, 8)
    true = torch.arange(30) % 3
    rows = (centres[true] + 0.1 * torch.randn(30, 8, generator=generator)) * torch.rand(
        30, 1, generator=generator
    )
    cluster = cluster_rows(rows, 3)
    for number in range(3):
        assert len(cluster[true == number].unique()) == 1
    assert len(cluster.unique()) == 3


def test_the_windows_that_were_harmed_most_are_chosen(tiny: MakeTiny) -> None:
    """Damage done to some tokens alone must bring the windows that are made of them."""
    dense, model = (load_eager(tiny("llama-untied")) for _ in range(2))
    hurt = torch.arange(200, 300)
    model.model.embed_tokens.weight[hurt] *= -1.0
    generator = torch.Generator().manual_seed(0)
    windows = tuple(
        torch.randint(*((200, 300) if index % 4 == 0 else (2, 200)), (20,), generator=generator)
        for index in range(24)
    )
    chosen = choose_windows(model, dense, Windows(windows, None, ""), 6, silent)
    assert [int(window.min()) >= 200 for window in chosen.windows] == [True] * 6
