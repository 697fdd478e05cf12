"""`skipstone tune`'s trainer for a model that is not always built as transformers would build it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model

from skipstone.exporters.compress.recover.net import sparse_weights
from skipstone.exporters.tune.trainer import LayerSkipTrainer

_WEIGHTS = "weights.safetensors"


class RecoverTrainer(LayerSkipTrainer):
    """Saves the weights of the modules as they are, pairs and adapters too, and lets no zero of a sparse one grow."""

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """That of `skipstone tune`; zeros stay, as Muon also moves what takes no gradient."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        sparse = [pair for pair in sparse_weights(self.task.net.model) if pair[0].requires_grad]

        def prune(*_: object) -> None:
            with torch.no_grad():
                for weight, kept in sparse:
                    weight.mul_(kept)

        optimizer.register_step_post_hook(prune)
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.task.net.model, str(folder / _WEIGHTS))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        load_model(self.task.net.model, Path(resume_from_checkpoint) / _WEIGHTS)
