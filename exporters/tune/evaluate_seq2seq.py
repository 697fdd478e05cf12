"""How well an encoder-decoder exits and corrects, on held-out sentences with errors that are always the same.

>>> report = evaluate_pairs(net, tokenizer, sources, targets)
>>> report.exits[0].agreement, report.encoder_exits[2].loss
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, EncoderDecoderCache

from skipstone.exporters.tune.correction import CorrectionFigures, score
from skipstone.exporters.tune.evaluate import ExitReport, exit_figures
from skipstone.exporters.tune.pairs import NO_TARGET, noisy, pair_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from skipstone.exporters.tune.pairs import SentenceCorpus
    from skipstone.exporters.tune.recipe import Noise
    from skipstone.exporters.tune.seq2seq import Seq2SeqNet

_HELD_OUT_EPOCH = -1
_BATCH = 32


@dataclass(frozen=True)
class Pairs:
    """Sentences with errors, and what they should be."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]


@dataclass(frozen=True)
class CorrectionReport:
    """Figures of several correctors by name, over the same sentences."""

    correctors: dict[str, CorrectionFigures]

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> CorrectionReport:
        """Read what `save` wrote."""
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls({name: CorrectionFigures(**figures) for name, figures in content["correctors"].items()})


def held_out_pairs(corpus: SentenceCorpus, noise: Noise, *, seed: int, size: int) -> Pairs:
    """Up to `size` held-out sentences, spread evenly over their files, with the errors of this seed."""
    count = len(corpus.held_out)
    chosen = np.linspace(0, count - 1, min(count, size)).astype(int).tolist()
    targets = tuple(corpus.held_out[index].text for index in chosen)
    sources = tuple(
        noisy(target, noise, seed=seed, epoch=_HELD_OUT_EPOCH, index=index)
        for index, target in zip(chosen, targets, strict=True)
    )
    return Pairs(sources, targets)


def evaluate_pairs(
    net: Seq2SeqNet, tokenizer: PreTrainedTokenizerFast, pairs: Pairs, *, trained: tuple[int, ...] = ()
) -> ExitReport:
    """Every exit of the decoder behind the whole encoder, and every exit of the encoder before the whole decoder.

    Targets are given (teacher forcing); layer dropout is off meanwhile.
    """
    model: Any = net.model
    layers, encoder_layers = len(model.decoder.block), len(model.encoder.block)
    totals = torch.zeros(layers, 3, dtype=torch.float64)
    encoder_totals = torch.zeros(encoder_layers, 3, dtype=torch.float64)
    counted = 0
    was_training = net.training
    net.eval()
    with torch.no_grad():
        for batch in _batches(tokenizer, pairs):
            batch = {name: part.to(model.device) for name, part in batch.items()}
            counted += int((batch["labels"] != NO_TARGET).sum())
            _add_totals(net, batch, totals, encoder_totals)
    net.train(was_training)
    return ExitReport(
        tokens=counted,
        exits=exit_figures(totals, counted, trained),
        encoder_exits=exit_figures(encoder_totals, counted, net.encoder_exits),
    )


def corrections(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, sources: Sequence[str]
) -> list[str]:
    """What the whole model makes of `sources`, greedily, in float32."""
    full: Any = copy.deepcopy(model)
    full = full.float().eval()
    corrected = [""] * len(sources)
    for chosen in _by_length(sources):
        batch = pair_batch(tokenizer.backend_tokenizer, [sources[index] for index in chosen], [""])
        inputs = {name: batch[name].to(full.device) for name in ("input_ids", "attention_mask")}
        longest = inputs["input_ids"].shape[1]
        # generate would make caches for as many layers as the encoder has, which a decoder may exceed.
        caches = EncoderDecoderCache(DynamicCache(), DynamicCache())
        with torch.no_grad():
            outputs = full.generate(
                **inputs, past_key_values=caches, max_new_tokens=longest + longest // 2 + 8, do_sample=False
            )
        for index, text in zip(
            chosen, tokenizer.batch_decode(outputs, skip_special_tokens=True), strict=True
        ):
            corrected[index] = text
    return corrected


def evaluate_correction(
    pairs: Pairs, correctors: dict[str, Callable[[Sequence[str]], list[str]]]
) -> CorrectionReport:
    """The figures of every corrector, and of leaving the text as it is."""
    texts = {"uncorrected": list(pairs.sources)}
    texts |= {name: correct(pairs.sources) for name, correct in correctors.items()}
    return CorrectionReport(
        {name: score(pairs.sources, corrected, pairs.targets) for name, corrected in texts.items()}
    )


def _by_length(texts: Sequence[str]) -> Iterator[list[int]]:
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    return (order[begin : begin + _BATCH] for begin in range(0, len(order), _BATCH))


def _batches(tokenizer: PreTrainedTokenizerFast, pairs: Pairs) -> Iterator[dict[str, Tensor]]:
    for chosen in _by_length(pairs.targets):
        texts = ([part[index] for index in chosen] for part in (pairs.sources, pairs.targets))
        yield pair_batch(tokenizer.backend_tokenizer, *texts)


def _add_totals(net: Seq2SeqNet, batch: dict[str, Tensor], totals: Tensor, encoder_totals: Tensor) -> None:
    """Add a batch's sums of loss, agreement and accuracy to those of each exit, [layers, 3]."""
    labels, mask = batch["labels"], batch["attention_mask"]
    every = tuple(range(1, len(totals)))
    states = net.hidden_states(net.encode(batch["input_ids"], mask), mask, labels, every)
    last = net.logits(states[-1]).argmax(-1)
    for index, state in enumerate(states):
        totals[index] += _sums(net.logits(state), last, labels)
    for index in range(len(encoder_totals)):
        source = net.encode(batch["input_ids"], mask, exit_layer=index + 1)
        encoder_totals[index] += _sums(
            net.logits(net.hidden_states(source, mask, labels, ())[-1]), last, labels
        )


def _sums(logits: Tensor, last: Tensor, labels: Tensor) -> Tensor:
    best, counted = logits.argmax(-1), labels != NO_TARGET
    loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    agreeing, right = ((best == other)[counted].sum() for other in (last, labels))
    return torch.tensor([float(loss), float(agreeing), float(right)], dtype=torch.float64)
