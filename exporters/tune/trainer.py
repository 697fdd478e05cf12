"""The LayerSkip recipe under transformers' Trainer, so accelerate places it on one device or on many."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch._inductor.exc import InductorError
from torch.utils.data import Dataset
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

from skipstone.errors import SkipstoneError
from skipstone.exporters.tune.optimizer import build_optimizer
from skipstone.exporters.tune.schedule import Clock, exit_turn, learning_rate_factor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerControl

    from skipstone.exporters.tune.objective import ExitLosses
    from skipstone.exporters.tune.recipe import Recipe
    from skipstone.exporters.tune.task import Trainee


class Windows(Dataset[dict[str, Tensor]]):
    """A token array cut into consecutive windows of `length` inputs; window i + 1 starts at window i's last
    target.
    """

    def __init__(self, tokens: npt.NDArray[np.unsignedinteger], length: int) -> None:
        self._tokens = tokens
        self._length = length

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        begin = index * self._length
        window = self._tokens[begin : begin + self._length + 1].astype(np.int64)
        return {"input_ids": torch.from_numpy(window)}


class LayerSkipTrainer(Trainer):
    """Trainer with the recipe's loss, optimizer and schedule, saving plain checkpoint folders of the model."""

    def __init__(
        self,
        task: Trainee,
        recipe: Recipe,
        rotation: tuple[tuple[int, ...], ...],
        clock: Clock,
        arguments: TrainingArguments,
    ) -> None:
        super().__init__(
            model=task.net,
            args=arguments,
            train_dataset=task.train,
            processing_class=task.tokenizer,
            data_collator=_only if task.batches else default_data_collator,
        )
        self.task = task
        self.recipe = recipe
        self.rotation = rotation
        self.clock = clock
        self.progress = 0.0
        self._sums = torch.zeros(3)

    def run(self, checkpoint: Path | None) -> None:
        """Train from the start or from `checkpoint` to the end of the clock.

        A run whose time was up already is not trained further: its last weights are loaded. Raises
        SkipstoneError when torch.compile finds no compiler.
        """
        if checkpoint is not None:
            reached = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            if self.clock.progress(reached.global_step) >= 1.0:
                self._load_from_checkpoint(str(checkpoint))
                self.state = reached
                return
        try:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except InductorError as error:
            raise SkipstoneError(
                f"torch.compile failed: {str(error).strip().splitlines()[0]}",
                hint="install a C++ compiler, or give --no-compile to train without (slower)",
            ) from error

    def compute_loss(  # type: ignore[override]
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """The last layer's loss plus the weighted mean of this step's exits, and what is to be aligned."""
        turn = exit_turn(self.recipe.layerskip, self.rotation, self.state.global_step, self.progress)
        losses = cast("ExitLosses", model(**inputs, exits=turn.exits, distil=turn.distil))
        exits = losses.exits / max(1, len(turn.exits))
        self._sums += torch.stack((losses.final.detach(), exits.detach(), torch.ones(()))).cpu()
        return losses.final + turn.weight * exits + losses.alignment

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW, or Muon and AdamW, over a float32 master copy of the weights."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.task.net, self.recipe.training)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Warm-up by steps, then a cosine of the run's progress in time or steps."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.create_optimizer(),
                lambda step: learning_rate_factor(self.recipe.training, step, self.progress),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the two losses apart, the minutes and the tokens to what is logged."""
        final, exits, steps = self._sums.tolist()
        if steps:
            logs |= {"final_loss": final / steps, "exit_loss": exits / steps}
            self._sums.zero_()
        logs |= {"minutes": self.clock.minutes, "progress": self.progress}
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the model and the tokenizer as an ordinary Hugging Face folder."""
        folder = Path(output_dir or cast(str, self.args.output_dir))
        if self.args.should_save:
            save_checkpoint(self.task.net.model, self.task.tokenizer, folder)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        """Load the model's weights from a folder that `_save` wrote."""
        own = self.task.net.model
        saved = type(own).from_pretrained(resume_from_checkpoint, dtype=own.dtype)
        own.load_state_dict(saved.state_dict())


class RunControl(TrainerCallback):
    """Keeps the trainer's progress by the clock, saves every `save_minutes`, and stops the run at its end."""

    def __init__(self, trainer: LayerSkipTrainer, save_minutes: float) -> None:
        self._trainer = trainer
        self._save_minutes = save_minutes
        self._saved_at = trainer.clock.minutes

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._trainer.clock.start()
        self._trainer.progress = self._trainer.clock.progress(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bring the progress up to date; ask for a checkpoint or for the end when it is time."""
        clock = self._trainer.clock
        clock.step()
        minutes, progress = _shared(clock.minutes, clock.progress(state.global_step), args.device)
        self._trainer.progress = progress
        if progress >= 1.0:
            control.should_training_stop = True
        if progress >= 1.0 or minutes - self._saved_at >= self._save_minutes:
            control.should_save = True
            self._saved_at = minutes

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the clock beside the checkpoint."""
        if args.should_save:
            self._trainer.clock.save(Path(cast(str, args.output_dir)) / f"checkpoint-{state.global_step}")


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer to `folder` in the Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def training_arguments(
    recipe: Recipe,
    output: Path,
    *,
    max_steps: int | None,
    log_steps: int = 20,
    cpu: bool = False,
    whole_batches: bool | None = None,
) -> TrainingArguments:
    """Trainer's arguments for a recipe. Without `max_steps` the run is ended by the clock alone.

    `whole_batches`: whether an example is a batch; None: for encoder-decoders.
    """
    training = recipe.training
    batches = recipe.task == "seq2seq" if whole_batches is None else whole_batches
    return TrainingArguments(
        output_dir=str(output),
        max_steps=max_steps or 1_000_000_000,
        per_device_train_batch_size=1 if batches else training.batch_size,
        dataloader_drop_last=True,
        learning_rate=training.learning_rate,
        max_grad_norm=training.max_grad_norm,
        logging_steps=log_steps,
        save_strategy="no",
        save_total_limit=2,
        seed=training.seed,
        report_to=[],
        remove_unused_columns=False,
        label_names=[],
        disable_tqdm=True,
        use_cpu=cpu or not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        ddp_find_unused_parameters=False,
    )


def last_checkpoint(output: Path) -> Path | None:
    """The newest complete checkpoint below `output`, or None."""
    found = [path.parent for path in output.glob("checkpoint-*/clock.json")]
    return max(found, key=lambda path: int(path.name.rsplit("-", 1)[-1]), default=None)


def _only(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The collator of examples that are whole batches."""
    (batch,) = items
    return batch


def _shared(minutes: float, progress: float, device: torch.device) -> tuple[float, float]:
    """The first process's figures on all processes, so that all stop and save at the same step."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_initialized():
        return minutes, progress
    figures = torch.tensor([minutes, progress], dtype=torch.float64, device=device)
    dist.broadcast(figures, src=0)
    return cast("tuple[float, float]", tuple(figures.tolist()))
