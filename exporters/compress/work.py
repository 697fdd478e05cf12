"""What the steps of a run share beside the model: calibration, exits, codes, and whom to tell of progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from skipstone.errors import UsageError
from skipstone.exporters.checkpoint import load_eager
from skipstone.exporters.compress.steps import Target
from skipstone.runtimes.cores import num_cores

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import nn

Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody wants to know of."""


@dataclass(frozen=True)
class Windows:
    """A text as stretches of token ids that start anew, at most 512 tokens each.

    Attributes:
        windows: token ids, int64 [n] each; of an encoder-decoder the decoder's, start token first.
        sources: token ids that the encoder reads, one per window; None for a decoder alone.
        sha256: of the text's file.
    """

    windows: tuple[Tensor, ...]
    sources: tuple[Tensor, ...] | None
    sha256: str

    @property
    def tokens(self) -> int:
        """Number of predicted tokens: all but the first of each window."""
        return sum(len(window) - 1 for window in self.windows)

    def inputs(self) -> Iterator[dict[str, Tensor]]:
        """By window, what transformers' model is called with: `model(**inputs)` gives logits [1, n, vocab_size]."""
        for index, window in enumerate(self.windows):
            if self.sources is None:
                yield {"input_ids": window[None]}
            else:
                yield {"input_ids": self.sources[index][None], "decoder_input_ids": window[None]}

    def first(self, tokens: int) -> Windows:
        """The leading windows that hold no more than `tokens` tokens together, one at least."""
        count, total = 0, 0
        for window in self.windows:
            total += len(window)
            if total > tokens and count:
                break
            count += 1
        sources = None if self.sources is None else self.sources[:count]
        return Windows(self.windows[:count], sources, self.sha256)


@dataclass(frozen=True)
class Codes:
    """A weight as an exporter must carry it: in a storage layout, bit by bit.

    Attributes:
        grid: name of the layout, say `q4_0`.
        parts: what the layout is made of, by name, say codes and scales; saved as they are.
        num_bytes: of the weight in that layout.
    """

    grid: str
    parts: dict[str, Tensor]
    num_bytes: int


@dataclass(frozen=True)
class FixedCodes:
    """All codes of a checkpoint, as its folder holds them.

    Attributes:
        scheme: what it is to be exported in.
        tables: schemes of the embedding (`embed`) and of the head (`head`) that differ from it, which the exporter
            follows where these have no codes.
        weights: by the weight's name in `model.state_dict()`.
        sha256: over all of that.
    """

    scheme: str
    tables: Mapping[str, str]
    weights: Mapping[str, Codes]
    sha256: str


@dataclass
class Work:
    """A run of compression, as its steps see it.

    Attributes:
        source: folder of the checkpoint that the run began with.
        target: what the result is for.
        tokenizer: the model's.
        text: calibration text in windows; None: none was given. Steps ask `calibration`.
        exits: recorded inner exits, of an encoder-decoder the decoder's; None: none are recorded.
        encoder_exits: likewise, the encoder's.
        kept: by stack (`decoder`, `encoder`), the numbers that its layers had in the source.
        codes: by the weight's name in `model.state_dict()`, what exporters carry; such a weight is equal to what its
            codes stand for.
        scheme: what the codes are to be exported in; None: there are none.
        tables: see `FixedCodes`.
        threads: CPU threads.
        cache: folder for what is worth keeping between runs.
        progress: told what is being done, how much of it is done, and how much there is.
    """

    source: Path
    target: Target
    tokenizer: Tokenizer
    text: Windows | None = None
    exits: tuple[int, ...] | None = None
    encoder_exits: tuple[int, ...] | None = None
    kept: dict[str, tuple[int, ...]] = field(default_factory=dict)
    codes: dict[str, Codes] = field(default_factory=dict)
    scheme: str | None = None
    tables: dict[str, str] = field(default_factory=dict)
    threads: int = field(default_factory=num_cores)
    cache: Path = Path()
    progress: Progress = silent

    @property
    def calibration(self) -> Windows:
        """The calibration text.

        Raises:
            UsageError: none was given.
        """
        if self.text is None:
            raise UsageError("a step needs a calibration text", hint="pass --calibration TEXT")
        return self.text

    @cached_property
    def dense(self) -> nn.Module:
        """The model that the run began with, in float32; loaded when first asked for, and not to be changed."""
        model: nn.Module = load_eager(self.source)
        return model


@torch.no_grad()
def mean_loss(model: Any, text: Windows) -> float:
    """Mean cross-entropy per predicted token, in nats."""
    total = 0.0
    for inputs, window in zip(text.inputs(), text.windows, strict=True):
        logits = model(**inputs).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    return total / max(text.tokens, 1)
