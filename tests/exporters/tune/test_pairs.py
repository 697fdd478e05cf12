from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from skipstone.errors import SkipstoneError
from skipstone.exporters.tune import pairs
from skipstone.exporters.tune.data import Source
from skipstone.exporters.tune.pairs import END_ID, NO_TARGET, PAD_ID, PairBatches
from skipstone.exporters.tune.recipe import Noise

SENTENCES = tuple(
    f"The {colour} {thing} is {' and '.join(['very'] * times)} large{end}"
    for colour in ("red", "green", "blue", "pale")
    for thing in ("house", "apple", "engine")
    for times in range(1, 9)
    for end in (".", ", or not.")
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=pairs.train_tokenizer(SENTENCES, 320), eos_token=pairs.END, pad_token=pairs.PAD
    )


def batches(tokenizer: PreTrainedTokenizerFast, **changes: object) -> PairBatches:
    arguments: dict[str, object] = {"longest": 64, "tokens_per_batch": 128, "seed": 3} | changes
    return PairBatches(SENTENCES, tokenizer, Noise(clean=0.2), **arguments)  # type: ignore[arg-type]


def texts(tokenizer: PreTrainedTokenizerFast, ids: torch.Tensor) -> list[str]:
    return tokenizer.batch_decode(ids.masked_fill(ids == NO_TARGET, PAD_ID), skip_special_tokens=True)


def test_the_tokenizer_is_lossless_and_ends_every_text(tokenizer: PreTrainedTokenizerFast) -> None:
    text = 'A naïve   text\twith 東京 🪨, it\'s "odd".'
    ids = tokenizer(text).input_ids
    assert ids[-1] == END_ID
    assert min(ids[:-1]) > END_ID
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.convert_ids_to_tokens([PAD_ID, END_ID]) == ["<pad>", "</s>"]


def test_an_epoch_has_every_sentence_once_as_a_target(tokenizer: PreTrainedTokenizerFast) -> None:
    data = batches(tokenizer)
    seen = [text for index in range(len(data)) for text in texts(tokenizer, data[index]["labels"])]
    assert sorted(seen) == sorted(SENTENCES)


def test_sources_are_the_targets_with_errors_in_most(tokenizer: PreTrainedTokenizerFast) -> None:
    data = batches(tokenizer)
    same = wrong = 0
    for index in range(len(data)):
        batch = data[index]
        for source, target in zip(
            texts(tokenizer, batch["input_ids"]), texts(tokenizer, batch["labels"]), strict=True
        ):
            same, wrong = same + (source == target), wrong + (source != target)
            assert abs(len(source) - len(target)) < len(target) / 2
    assert same / (same + wrong) == pytest.approx(0.2, abs=0.12)


def test_padding_is_marked_and_nothing_else(tokenizer: PreTrainedTokenizerFast) -> None:
    data = batches(tokenizer)
    for index in range(len(data)):
        batch = data[index]
        assert torch.equal(batch["attention_mask"], (batch["input_ids"] != PAD_ID).long())
        assert (batch["labels"] == END_ID).sum(1).tolist() == [1] * len(batch["labels"])
        after_end = (batch["labels"] == END_ID).cumsum(1).roll(1, 1)[:, 1:] == 1
        assert torch.equal(after_end, (batch["labels"] == NO_TARGET)[:, 1:])


def test_batches_hold_the_tokens_they_may_and_hardly_any_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    data = batches(tokenizer)
    sizes = [data[index]["labels"].numel() for index in range(len(data))]
    assert max(sizes) <= 128
    assert data.tokens == sum(int((data[i]["labels"] != NO_TARGET).sum()) for i in range(len(data)))
    assert sum(sizes) < 1.05 * data.tokens


def test_sources_of_about_one_length_meet(tokenizer: PreTrainedTokenizerFast) -> None:
    data = PairBatches(SENTENCES * 20, tokenizer, Noise(clean=0.2), longest=64, tokens_per_batch=512, seed=3)
    masks = [data[index]["attention_mask"] for index in range(len(data))]
    padded = sum(mask.numel() for mask in masks) / sum(int(mask.sum()) for mask in masks)
    assert padded < 1.2  # 1.59 where the targets' lengths alone decide


def test_epochs_differ_in_company_and_errors_and_come_back_the_same(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    data, other = batches(tokenizer), batches(tokenizer)
    first = [data[index]["input_ids"] for index in range(len(data))]
    data.set_epoch(1)
    assert len(data) == len(first)
    second = [data[index]["input_ids"] for index in range(len(data))]
    assert not any(
        one.shape == two.shape and torch.equal(one, two) for one, two in zip(first, second, strict=True)
    )
    other.set_epoch(1)
    assert all(torch.equal(other[index]["input_ids"], ids) for index, ids in enumerate(second))
    data.set_epoch(0)
    assert all(torch.equal(data[index]["input_ids"], ids) for index, ids in enumerate(first))


def test_sentences_that_are_too_long_are_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    lengths = [len(ids) for ids in tokenizer(list(SENTENCES)).input_ids]
    limit = int(np.median(lengths))
    data = batches(tokenizer, longest=limit)
    assert data.tokens == sum(length for length in lengths if length <= limit)
    with pytest.raises(SkipstoneError, match="no sentence has 3 tokens") as caught:
        batches(tokenizer, longest=3)
    assert "sequence_length" in caught.value.hint


def test_a_saved_corpus_loads_the_same(tmp_path: Path) -> None:
    kept = "The first sentence is for the training. The second is as well."
    held = "The last of the sentences is held out."
    sources = [Source("data", "a.txt", kept, "a", False), Source("data", "b.txt", held, "b", True)]
    corpus = pairs.sentence_corpus(sources)
    assert corpus.train == ("The first sentence is for the training.", "The second is as well.")
    assert [sentence.text for sentence in corpus.held_out] == [held]
    pairs.save(corpus, tmp_path)
    assert pairs.load(tmp_path) == corpus


def test_a_corpus_without_held_out_prose_is_refused() -> None:
    with pytest.raises(SkipstoneError, match="no held-out sentences"):
        pairs.sentence_corpus([Source("data", "a.txt", "The sentence is for the training.", "a", False)])
