"""Sources and targets for an encoder-decoder: clean sentences as targets, made wrong anew every epoch as sources.

Batches are of one length and of one number of tokens: next to nothing is spent on padding, and steps take equally
long. Which sentences meet in a batch, and what is wrong with them, follows from the seed, the epoch and the
sentence's number alone, so a resumed run sees the batches that it would have seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.utils.data import Dataset

from skipstone.errors import SkipstoneError
from skipstone.exporters.tune.alignment import NOWHERE, align
from skipstone.exporters.tune.data import PackageShare, Source, package_shares
from skipstone.exporters.tune.noise import corrupt
from skipstone.exporters.tune.prose import Sentence, collect_sentences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from skipstone.exporters.tune.recipe import Noise

PAD, END = "<pad>", "</s>"
PAD_ID, END_ID = 0, 1
NO_TARGET = -100  # in labels: a position without a target


@dataclass(frozen=True)
class SentenceCorpus:
    """Clean sentences of the training and of the held-out files, and what each package contributes."""

    train: tuple[str, ...]
    held_out: tuple[Sentence, ...]
    shares: tuple[PackageShare, ...]


def sentence_corpus(sources: Sequence[Source]) -> SentenceCorpus:
    """The prose of `sources`, split as their files are.

    Raises SkipstoneError when either part is empty.
    """
    found = collect_sentences(sources)
    train = tuple(sentence.text for sentence in found if not sentence.held_out)
    held_out = tuple(sentence for sentence in found if sentence.held_out)
    if not train or not held_out:
        raise SkipstoneError(
            f"{len(sources)} texts leave {'no held-out' if train else 'no training'} sentences of prose",
            hint="give more files, or lower corpus.held_out_modulus",
        )
    return SentenceCorpus(train, held_out, package_shares(sources))


def train_tokenizer(sentences: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE, lossless, with T5's special tokens: `<pad>` is id 0 and `</s>`, which ends every text, id 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, END_ID)]
    )
    return tokenizer


def save(corpus: SentenceCorpus, folder: Path) -> None:
    """Write `train.json`, `held_out.json` and `corpus.json` to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {
        "train": corpus.train,
        "held_out": [asdict(sentence) for sentence in corpus.held_out],
        "corpus": [asdict(share) for share in corpus.shares],
    }
    for name, part in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(part, indent=0) + "\n", encoding="utf-8")


def load(folder: Path) -> SentenceCorpus:
    """Read what `save` wrote."""
    train, held_out, shares = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("train", "held_out", "corpus")
    )
    return SentenceCorpus(
        tuple(train),
        tuple(Sentence(**sentence) for sentence in held_out),
        tuple(PackageShare(**share) for share in shares),
    )


def noisy(sentence: str, noise: Noise, *, seed: int, epoch: int, index: int) -> str:
    """The source of sentence number `index` in an epoch of a run."""
    return corrupt(sentence, Random(f"{seed}/{epoch}/{index}"), noise)


class PairBatches(Dataset[dict[str, Tensor]]):
    """The batches of one epoch; `set_epoch` goes to another. Its length is the same for all epochs.

    A batch has `input_ids` and `attention_mask`, int64 [batch, source length], and `labels`, int64 [batch, target
    length], NO_TARGET after a target's end. `aligned` ones have `alignment` too, of the same shape: each target's place
    in the source, negative where it has none.
    """

    def __init__(
        self,
        sentences: Sequence[str],
        tokenizer: PreTrainedTokenizerFast,
        noise: Noise,
        *,
        longest: int,
        tokens_per_batch: int,
        seed: int,
        aligned: bool = False,
    ) -> None:
        """`longest` is in tokens, the end included: sentences of more are left out."""
        self._tokenizer = tokenizer.backend_tokenizer
        self._noise = noise
        self._seed = seed
        self._aligned = aligned
        lengths = _lengths(self._tokenizer, sentences)
        fitting = np.flatnonzero(lengths <= longest)
        if not len(fitting):
            raise SkipstoneError(
                f"no sentence has {longest} tokens or less", hint="raise training.sequence_length"
            )
        self._sentences = [sentences[index] for index in fitting.tolist()]
        self._lengths = lengths[fitting]
        self._cuts = _cuts(np.sort(self._lengths), tokens_per_batch)
        self._order: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._sources: list[str] = []
        self.set_epoch(0)

    @property
    def tokens(self) -> int:
        """Target tokens of an epoch."""
        return int(self._lengths.sum())

    def set_epoch(self, epoch: int) -> None:
        """Mix the sentences of each length anew, and make other errors in them.

        Among targets of one length those meet whose sources are about as long: where words are wrong a source has more
        tokens, and the encoder would spend a fifth of its time on padding.
        """
        self._sources = [
            noisy(target, self._noise, seed=self._seed, epoch=epoch, index=index)
            for index, target in enumerate(self._sentences)
        ]
        lengths = _lengths(self._tokenizer, self._sources)
        mixed = np.random.default_rng((self._seed, epoch)).permutation(len(self._lengths))
        self._order = mixed[np.lexsort((lengths[mixed], self._lengths[mixed]))]

    def __len__(self) -> int:
        return len(self._cuts) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        chosen = self._order[self._cuts[index] : self._cuts[index + 1]]
        targets = [self._sentences[number] for number in chosen]
        sources = [self._sources[number] for number in chosen]
        return pair_batch(self._tokenizer, sources, targets, aligned=self._aligned)


def pair_batch(
    tokenizer: Tokenizer, sources: Sequence[str], targets: Sequence[str], *, aligned: bool = False
) -> dict[str, Tensor]:
    """What `PairBatches` gives, for these texts."""
    inputs = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(sources))]
    labels = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(targets))]
    padded = _padded(inputs, PAD_ID)
    lengths = torch.tensor([len(ids) for ids in inputs])
    batch = {
        "input_ids": padded,
        "attention_mask": (torch.arange(padded.shape[1]) < lengths.unsqueeze(1)).long(),
        "labels": _padded(labels, NO_TARGET),
    }
    if aligned:
        places = [align(source, target) for source, target in zip(inputs, labels, strict=True)]
        batch["alignment"] = _padded(places, NOWHERE)
    return batch


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """int64 [rows, longest row], `value` behind the others' ends."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def token_stream(tokenizer: Tokenizer, sentences: Sequence[str]) -> npt.NDArray[np.int64]:
    """The tokens of all sentences, one after the other."""
    return np.array([token for ids in _encoded(tokenizer, sentences) for token in ids], np.int64)


def _encoded(tokenizer: Tokenizer, sentences: Sequence[str]) -> Iterator[list[int]]:
    for begin in range(0, len(sentences), 4096):
        part = list(sentences[begin : begin + 4096])
        yield from (encoding.ids for encoding in tokenizer.encode_batch_fast(part))


def _lengths(tokenizer: Tokenizer, sentences: Sequence[str]) -> npt.NDArray[np.int64]:
    return np.array([len(ids) for ids in _encoded(tokenizer, sentences)], np.int64)


def _cuts(rising: npt.NDArray[np.int64], tokens_per_batch: int) -> list[int]:
    """Where to cut sentences of `rising` lengths into batches of at most `tokens_per_batch`, padding counted."""
    cuts = [0]
    for index, length in enumerate(rising):
        if (index + 1 - cuts[-1]) * int(length) > tokens_per_batch and index > cuts[-1]:
            cuts.append(index)
    return [*cuts, len(rising)]
