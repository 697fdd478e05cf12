"""A tiny model's bundle for an NPU, exported once per run."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.exporters.tiny import GENTLE, make_checkpoint
from tests.once import once

WIDTHS = (1, 4, 8)


def tiny_checkpoint(folders: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama of two layers; not to be changed."""
    case = replace(GENTLE, config={"num_hidden_layers": 2})
    return once(folders, "tiny-npu/gentle", lambda folder: make_checkpoint(folder, case))


def tiny_npu_bundle(folders: pytest.TempPathFactory) -> Path:
    """Folder of its bundle for SM8650: a16w8, cut after layer 1, 64 slots, shared binaries too; not to be changed."""

    def export(output: Path) -> None:
        from skipstone.exporters.pipeline import export_checkpoint

        export_checkpoint(
            tiny_checkpoint(folders),
            output,
            device="qualcomm-sm8650",
            exits=(1,),
            context_length=64,
            widths=WIDTHS,
            share_weights=True,
        )

    return once(folders, "tiny-npu/bundle", export)
