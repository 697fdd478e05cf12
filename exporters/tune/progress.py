"""What a running tune shows: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from skipstone.exporters.tune.task import Trainee
    from skipstone.exporters.tune.trainer import LayerSkipTrainer


class ShowProgress(TrainerCallback):
    """Shows how far the run is, both losses and the speed; only on the first process."""

    def __init__(self, trainer: LayerSkipTrainer, console: Console) -> None:
        self._trainer = trainer
        self._console = console
        self._bar = Progress(
            TextColumn("tune"),
            BarColumn(),
            TextColumn("{task.percentage:>5.1f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("tune", total=1.0, figures="compiling")
        self._last = (0, 0.0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._last = (state.global_step, self._trainer.clock.minutes)
        if state.is_world_process_zero:
            self._bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._bar.update(self._task, completed=self._trainer.progress)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or "final_loss" not in logs:
            return
        figures = f"step {state.global_step}  loss {logs['final_loss']:.3f}  exits {logs['exit_loss']:.3f}"
        figures += f"  {self._tokens_per_second(args, state):,.0f} tokens/s"
        if self._console.is_terminal:
            self._bar.update(self._task, figures=figures)
        else:
            self._console.print(
                f"{self._trainer.progress:6.1%}  {logs['minutes']:.1f} min  {figures}", soft_wrap=True
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._bar.stop()

    def _tokens_per_second(self, args: TrainingArguments, state: TrainerState) -> float:
        """Since the last line, over all processes."""
        step, minutes = self._last
        self._last = (state.global_step, self._trainer.clock.minutes)
        tokens = (state.global_step - step) * tokens_per_step(self._trainer.task, args.world_size)
        return tokens / max(1e-9, 60 * (self._last[1] - minutes))


def tokens_per_step(task: Trainee, processes: int) -> float:
    """Predicted tokens in one optimizer step over all processes, on average."""
    return task.tokens_per_step * processes
