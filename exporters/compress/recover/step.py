"""The step that trains a compressed model on what the dense one says of a text."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from skipstone.errors import UsageError
from skipstone.exporters.checkpoint import quiet_loading
from skipstone.exporters.compress.fidelity import measure_fidelity
from skipstone.exporters.compress.recipe import options_of
from skipstone.exporters.compress.recover.batches import Batches, choose_windows
from skipstone.exporters.compress.recover.lora import adapted
from skipstone.exporters.compress.shapes import facts_of, open_source
from skipstone.exporters.compress.steps import Details, Shape, Step, Target, refuse_after_codes
from skipstone.exporters.compress.texts import read_windows
from skipstone.exporters.compress.work import Windows, Work
from skipstone.runtimes.user_cache import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from skipstone.exporters.tune.distillation import DistillationNet
    from skipstone.exporters.tune.recipe import Recipe

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(gt=0)]

_SAVE_MINUTES = 5.0
_MEASURED = 2048  # tokens that the record's two figures are taken on
_STALE = 14 * 24 * 3600.0  # seconds after which a run that was cut off is not waited for


class Recover(Step):
    """Train the model to say what the dense one says, at its last layer and at every recorded exit.

    The training is that of `skipstone tune`, with the exits in turn. Weights that are zero stay zero. With `lora`, the
    blocks' linear layers alone change, each by a matrix of that rank.

    Attributes:
        steps: of the optimizer; 0 changes nothing.
        batch: windows of a step.
        learning_rate: the highest, behind a warm-up and before a cosine.
        matrix_learning_rate: likewise, of Muon on the blocks' matrices; 0: AdamW trains these too.
        text: to train on; none: the calibration text.
        tokens: of `text` to read at most.
        select: share of the windows to train on: those that the model has most to learn from (`batches.choose_windows`).
        temperature: of both models' distributions.
        hidden: weight of the distance from the dense model's hidden states.
        data: share of the text itself in the targets, beside the dense model's distributions.
        exit_weight: of the exits' loss beside the last layer's.
        seed: of the order of windows.
        lora: rank of the adapters that are trained instead of the weights; 0 changes nothing; None: all weights are.
        alpha: of the adapters' scale, alpha / lora; None: twice their rank.
        dtype: of both models while they train, bfloat16 over a float32 master copy or float32.
        compile: compile layers and losses, which takes a minute or two.
    """

    kind: ClassVar[str] = "recover"
    steps: Annotated[int, Field(ge=0)] = 200
    batch: Count = 8
    learning_rate: Annotated[float, Field(gt=0.0)] = 5e-4
    matrix_learning_rate: Weight = 0.0
    text: Path | None = None
    tokens: Annotated[int, Field(ge=2)] = 1_000_000
    select: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    hidden: Weight = 0.1
    data: Share = 0.0
    exit_weight: Weight = 0.8
    seed: int = 0
    lora: Annotated[int, Field(ge=0)] | None = None
    alpha: Annotated[float, Field(gt=0.0)] | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    compile: bool = False

    @model_validator(mode="after")
    def _alpha_has_adapters(self) -> Self:
        if self.alpha is not None and not self.lora:
            raise ValueError("alpha scales the adapters of lora, which was not given")
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether the calibration text is trained on."""
        return self.text is None and self._trains

    @property
    def _trains(self) -> bool:
        return self.steps > 0 and self.lora != 0

    @property
    def reads(self) -> tuple[Path, ...]:
        """The text, if there is one."""
        return () if self.text is None else (self.text,)

    def check(self, shape: Shape, target: Target) -> Shape:
        refuse_after_codes(shape, self.kind)
        if self.text is not None and not self.text.is_file():
            raise UsageError(f"recover: text={self.text}: no such file", hint="name a text or .jsonl file")
        return shape

    def apply(self, model: nn.Module, work: Work) -> Details:
        if not self._trains:
            return {"windows": 0, "trained_tokens": 0}
        text = self._windows(model, work)
        measured = text.first(_MEASURED)
        before = measure_fidelity(model, work, measured)
        with _run_folder(self, model, work, text) as folder:
            if self.lora:
                with adapted(model, self.lora, self.alpha or 2.0 * self.lora, self.seed) as adapters:
                    trained = _train(self, model, work, text, folder, adapters)
            else:
                trained = _train(self, model, work, text, folder)
        after = measure_fidelity(model, work, measured)
        return {
            "windows": len(text.windows),
            "text_sha256": text.sha256,
            "trained_tokens": trained,
            "kl_divergence": {"before": before.kl_divergence, "after": after.kl_divergence},
        }

    def _windows(self, model: Any, work: Work) -> Windows:
        """What to train on."""
        text = work.text if self.text is None else None
        if self.text is not None:
            facts = facts_of(open_source(work.source))
            text = read_windows(self.text, "recover: text", work.tokenizer, facts, self.tokens)
        text = work.calibration if text is None else text
        count = max(1, round(self.select * len(text.windows)))
        if count == len(text.windows):
            return text
        return choose_windows(model, work.dense, text, count, work.progress)

    def recipe(self, exits: tuple[int, ...], *, encodes: bool) -> Recipe:
        """The step as a recipe of `skipstone tune`: no layer dropout, and the exits' losses from the first step on."""
        from skipstone.exporters.tune.recipe import LayerSkip, Recipe, Training

        return Recipe(
            task="seq2seq" if encodes else "decoder",
            layerskip=LayerSkip(
                max_dropout=0.0,
                rotation=tuple((exit_layer,) for exit_layer in exits) or ((),),
                exit_weight=self.exit_weight,
                distil=1.0 - self.data,
                ramp=0.0,
            ),
            training=Training(
                batch_size=self.batch,
                learning_rate=self.learning_rate,
                matrix_learning_rate=self.matrix_learning_rate,
                warmup_steps=max(1, min(100, self.steps // 10)),
                weight_decay=0.0,
                seed=self.seed,
            ),
        )


@dataclass(frozen=True)
class _Trainee:
    """What the trainer is given; see `skipstone.exporters.tune.task.Trainee`."""

    net: DistillationNet
    tokenizer: PreTrainedTokenizerFast
    train: Batches
    batches: bool = True

    @property
    def tokens_per_step(self) -> float:
        """Predicted tokens of a batch."""
        return self.train.tokens


def _train(
    options: Recover,
    model: Any,
    work: Work,
    text: Windows,
    folder: Path,
    only: Sequence[nn.Parameter] | None = None,
) -> int:
    """Train a model in place, or `only` some weights of it, from the start or from the last checkpoint in a folder; the
    tokens it was trained on.
    """
    from transformers import PreTrainedTokenizerFast, PrinterCallback

    from skipstone.exporters.compress.recover.net import (
        TellProgress,
        distillation_net,
        in_bfloat16,
        trainable,
    )
    from skipstone.exporters.compress.recover.trainer import RecoverTrainer
    from skipstone.exporters.tune.schedule import Clock
    from skipstone.exporters.tune.trainer import RunControl, last_checkpoint, training_arguments

    exits = work.exits or ()
    recipe = options.recipe(exits, encodes=text.sources is not None)
    batches = Batches(text, batch=options.batch, steps=options.steps, seed=options.seed)
    clock, last = Clock(max_minutes=None, max_steps=options.steps), last_checkpoint(folder)
    if last is not None:
        clock.resume(last)
    lowered = in_bfloat16(model, work.dense) if options.dtype == "bfloat16" else nullcontext()
    with trainable(model, work.dense, only), lowered, quiet_loading():
        trainee = _Trainee(
            distillation_net(model, work, options),
            PreTrainedTokenizerFast(tokenizer_object=work.tokenizer),  # type: ignore[no-untyped-call]
            batches,
        )
        arguments = training_arguments(
            recipe, folder, max_steps=options.steps, log_steps=10, whole_batches=True
        )
        trainer = RecoverTrainer(trainee, recipe, recipe.layerskip.rotation, clock, arguments)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(RunControl(trainer, _SAVE_MINUTES))
        trainer.add_callback(TellProgress(work.progress))
        trainer.run(last)
    return round(options.steps * batches.tokens)


@contextmanager
def _run_folder(options: Recover, model: Any, work: Work, text: Windows) -> Iterator[Path]:
    """A folder for the checkpoints of this very training, which stays if it is cut off and goes when it is done."""
    runs = cache_folder() / "recoveries"
    folder = runs / _key(options, model, work, text)
    folder.mkdir(parents=True, exist_ok=True)
    for other in runs.iterdir():
        if other != folder and time.time() - other.stat().st_mtime > _STALE:
            shutil.rmtree(other, ignore_errors=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _key(options: Recover, model: Any, work: Work, text: Windows) -> str:
    """A hash of all that the trained weights come from."""
    given = {"options": options_of(options), "exits": work.exits, "kept": work.kept}
    digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode())
    tensors: list[Tensor] = [*text.windows, *(text.sources or ())]
    for module in (model, work.dense):
        tensors += [tensor for _, tensor in sorted(module.state_dict().items())]
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
