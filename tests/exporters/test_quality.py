"""Perplexity and divergence of an artefact, against transformers' own loss."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from skipstone.errors import UsageError
from skipstone.exporters import quality
from skipstone.exporters.pipeline import export_checkpoint
from tests.exporters.tiny import CASES, GENTLE, make_checkpoint
from tests.exporters.tiny_t5 import EOS, T5_CASES, make_t5

_TEXTS = (
    "def read(path):\n    return path.read_text()\n" * 12,
    "the river is the same on the other day " * 30,
)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "held_out.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in _TEXTS), encoding="utf-8")
    return file


def _loss_by_transformers(checkpoint: Path, length: int) -> tuple[float, int]:
    """Sum of the losses that transformers computes itself, window by window, and the number of tokens."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    total, count = 0.0, 0
    for text in _TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        for first in range(0, len(ids), length):
            window = torch.tensor([ids[first : first + length]])
            if window.shape[1] > 1:
                with torch.no_grad():
                    total += float(model(window, labels=window).loss) * (window.shape[1] - 1)
                count += window.shape[1] - 1
    return total, count


def test_perplexity_is_what_transformers_computes(tmp_path: Path, held_out: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "tiny", GENTLE)
    bundle = export_checkpoint(checkpoint, tmp_path / "f32", quantize="f32", held_out=held_out)
    found = bundle.manifest.quality
    assert found is not None
    total, count = _loss_by_transformers(checkpoint, bundle.manifest.model.context_length)
    assert found.tokens == count
    assert found.reference_perplexity == pytest.approx(np.exp(total / count), rel=1e-4)
    assert found.perplexity == pytest.approx(found.reference_perplexity, rel=1e-3)
    assert found.kl_divergence == pytest.approx(0.0, abs=1e-5)
    assert found.agreement == 1.0
    assert [(exit.exit, exit.dense_exit) for exit in found.exits] == [(e, e) for e in bundle.manifest.exits]
    assert all(0 < exit.own_last <= 1 for exit in found.exits)
    coarse = export_checkpoint(
        checkpoint, tmp_path / "q4_0", quantize="q4_0", held_out=held_out
    ).manifest.quality
    assert coarse is not None
    assert coarse.reference_perplexity == pytest.approx(found.reference_perplexity, rel=1e-6)
    assert coarse.kl_divergence is not None
    assert coarse.kl_divergence > 1e-3
    assert coarse.agreement is not None
    assert coarse.agreement < 1.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"prompt": "b"}\n', "line 2: no text under the key 'text'"),
        ("[1]\n", "line 1: no text"),
        ("no json\n", "line 1: no text"),
    ],
)
def test_a_line_without_text_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        quality.held_out_texts(file)


def test_a_held_out_set_that_cannot_be_read_stops_the_export_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--held-out .*missing.txt: cannot be read"):
        export_checkpoint("nowhere", tmp_path / "out", held_out=tmp_path / "missing.txt")


def test_a_text_too_short_to_predict_in_is_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "tiny", CASES["llama"])
    text = tmp_path / "short.txt"
    text.write_text("a", encoding="utf-8")
    with pytest.raises(UsageError, match="no two tokens to predict"):
        export_checkpoint(checkpoint, tmp_path / "out", quantize="f32", held_out=text)
    assert not (tmp_path / "out").exists()


def _pairs(file: Path) -> list[tuple[str, str]]:
    pairs = [
        ("teh river is teh same", "the river is the same"),
        ("read teh files", "read the file"),
        ("a other day on " * 8, "another day on " * 8),
    ]
    lines = [json.dumps({"source": source, "target": target}) for source, target in pairs]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return pairs


def test_an_encoder_decoders_perplexity_is_that_of_targets_behind_sources(tmp_path: Path) -> None:
    from transformers import T5ForConditionalGeneration

    checkpoint = make_t5(tmp_path / "tiny", T5_CASES["gentle"])
    file = tmp_path / "pairs.jsonl"
    pairs = _pairs(file)
    found = export_checkpoint(checkpoint, tmp_path / "f32", quantize="f32", held_out=file).manifest.quality
    assert found is not None
    model: Any = T5ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    total, count = 0.0, 0
    for source, target in pairs:
        labels = torch.tensor([[*tokenizer.encode(target, add_special_tokens=False).ids, EOS]])
        with torch.no_grad():  # transformers puts the start token before the labels itself
            loss = model(torch.tensor([tokenizer.encode(source).ids]), labels=labels).loss
        total, count = total + float(loss) * labels.shape[1], count + labels.shape[1]
    assert found.tokens == count
    assert found.reference_perplexity == pytest.approx(np.exp(total / count), rel=1e-4)
    assert found.perplexity == pytest.approx(found.reference_perplexity, rel=1e-3)
    assert found.agreement == 1.0


@pytest.mark.parametrize("encodes", [True, False])
def test_a_held_out_set_for_the_other_kind_of_model_is_refused(
    encodes: bool, held_out: Path, tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    _pairs(pairs)
    if encodes:
        checkpoint, file = make_t5(tmp_path / "tiny", T5_CASES["t5"]), held_out
    else:
        checkpoint, file = make_checkpoint(tmp_path / "tiny", GENTLE), pairs
    with pytest.raises(UsageError, match="sources and targets"):
        export_checkpoint(checkpoint, tmp_path / "out", quantize="f32", held_out=file)
    assert not (tmp_path / "out").exists()
