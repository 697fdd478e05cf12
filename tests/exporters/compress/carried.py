"""Small checkpoints whose codes are fixed, for exporters to carry."""

from pathlib import Path

import torch
from tokenizers import Tokenizer

from skipstone.bundle import Compression, ModelSize
from skipstone.exporters.checkpoint import load_eager, open_checkpoint
from skipstone.exporters.compress.folder import write_folder
from skipstone.exporters.compress.quantize.step import Quantize
from skipstone.exporters.compress.steps import Target
from skipstone.exporters.compress.work import Windows, Work
from tests.exporters.compress.test_activations import texts


def quantized(source: Path, folder: Path, step: Quantize) -> Path:
    """Write what a step makes of a checkpoint into a new folder, as a run of compression does."""
    sources = tuple(texts((40,) * 4, seed=1)) if open_checkpoint(source).is_encoder_decoder else None
    work = Work(
        source=source,
        target=Target(),
        tokenizer=Tokenizer.from_file(str(source / "tokenizer.json")),
        text=Windows(tuple(texts((60,) * 4)), sources, "0"),
    )
    model = load_eager(source)
    step.apply(model, work)
    folder.mkdir()
    size = ModelSize(parameters=1, nonzero=1, num_bytes=1)
    record = Compression(source=str(source), source_sha256="0" * 64, before=size, steps=())
    write_folder(model, work, record, folder)
    return folder


def logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    """What torch computes with the checkpoint's weights, which are what its codes stand for: float32 [n, vocab_size]."""
    with torch.no_grad():
        found: torch.Tensor = load_eager(folder)(torch.tensor([tokens])).logits[0]
    return found
