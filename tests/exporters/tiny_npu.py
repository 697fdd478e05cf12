"""A tiny model's bundle for an NPU, exported once per run."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.exporters.tiny import GENTLE, make_checkpoint

WIDTHS = (1, 4, 8)
_made: dict[str, Path] = {}


def tiny_checkpoint(folders: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama of two layers; not to be changed."""
    if "checkpoint" not in _made:
        case = replace(GENTLE, config={"num_hidden_layers": 2})
        _made["checkpoint"] = make_checkpoint(folders.mktemp("tiny-npu") / "gentle", case)
    return _made["checkpoint"]


def tiny_npu_bundle(folders: pytest.TempPathFactory) -> Path:
    """Folder of its bundle for SM8650: a16w8, cut after layer 1, 64 slots, shared binaries too; not to be changed."""
    if "bundle" not in _made:
        from skipstone.exporters.pipeline import export_checkpoint

        output = folders.mktemp("tiny-npu") / "bundle"
        export_checkpoint(
            tiny_checkpoint(folders),
            output,
            device="qualcomm-sm8650",
            exits=(1,),
            context_length=64,
            widths=WIDTHS,
            share_weights=True,
        )
        _made["bundle"] = output
    return _made["bundle"]
