"""`skipstone tune`'s trainer for a model that is not always built as transformers would build it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model

from skipstone.exporters.tune.trainer import LayerSkipTrainer

_WEIGHTS = "weights.safetensors"


class RecoverTrainer(LayerSkipTrainer):
    """Keeps the weights of the modules as they are, pairs and adapters too."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.task.net.model, str(folder / _WEIGHTS))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        load_model(self.task.net.model, Path(resume_from_checkpoint) / _WEIGHTS)
