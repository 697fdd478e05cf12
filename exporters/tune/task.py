"""What a run trains, apart from how: one implementation for decoders and one for encoder-decoders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from skipstone.exporters.tune.card import Description
    from skipstone.exporters.tune.data import PackageShare, Source
    from skipstone.exporters.tune.distillation import DistillationNet
    from skipstone.exporters.tune.evaluate import ExitReport
    from skipstone.exporters.tune.evaluate_seq2seq import CorrectionReport
    from skipstone.exporters.tune.objective import LayerSkipNet
    from skipstone.exporters.tune.recipe import Recipe
    from skipstone.exporters.tune.seq2seq import Seq2SeqNet


@dataclass(frozen=True)
class Ingredients:
    """What a task is prepared from.

    Attributes:
        recipe: of this task.
        model: to tune.
        tokenizer: the model's own, or None for a new one.
        folder: where the prepared corpus is kept, and taken from if it is there.
        sources: reads the corpus.
        compile_parts: whether to compile layers and heads.
        cpu: whether the run stays on the CPU.
    """

    recipe: Recipe
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast | None
    folder: Path
    sources: Callable[[], list[Source]]
    compile_parts: bool
    cpu: bool


@dataclass(frozen=True)
class Evaluation:
    """What held-out text shows: of every exit, and of a model that corrects, how well it does."""

    exits: ExitReport
    correction: CorrectionReport | None = None


class Trainee(Protocol):
    """What the trainer needs: a model and examples.

    Attributes:
        net: called with a batch of `train` and `exits` and `distil`, returning `ExitLosses`; `net.model` is the
            checkpoint's own model.
        tokenizer: written beside the weights.
        train: single examples or whole batches.
        batches: whether an item of `train` is a whole batch.
        tokens_per_step: target tokens that a process predicts in one step, on average.
    """

    @property
    def net(self) -> LayerSkipNet | Seq2SeqNet | DistillationNet: ...
    @property
    def tokenizer(self) -> PreTrainedTokenizerFast: ...
    @property
    def train(self) -> Dataset[dict[str, Tensor]]: ...
    @property
    def batches(self) -> bool: ...
    @property
    def tokens_per_step(self) -> float: ...


class Task(Trainee, Protocol):
    """A model, its corpus, and how both are measured and described; `train` is the corpus' training part.

    Attributes:
        num_layers: layers of the stack that has the exits.
        corpus_tokens: target tokens of the training part.
        shares: what each package contributes to the corpus.
    """

    @property
    def net(self) -> LayerSkipNet | Seq2SeqNet: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def corpus_tokens(self) -> int: ...
    @property
    def shares(self) -> tuple[PackageShare, ...]: ...

    def evaluate(self, trained: tuple[int, ...], size: int) -> Evaluation:
        """The model on held-out text, up to `size` sequences; `trained` are the exits that had a loss."""

    def write_beside(self, evaluation: Evaluation, folder: Path) -> None:
        """Write what the task adds to a finished checkpoint folder."""

    def describe(self, evaluation: Evaluation) -> Description:
        """What the model card says of this task and no other."""
