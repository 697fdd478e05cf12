"""What the manifest of a GGUF bundle says of an encoder must fit together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from skipstone.bundle import Bundle, EncoderFacts, GgufManifest, OnnxManifest, manifest_of
from skipstone.errors import BundleError

_HASH = "0" * 64
_FILES = ("tokenizer.json", "encoder-0.gguf", "encoder-1.gguf", "segment-0.gguf", "segment-1.gguf")


def manifest(**changes: Any) -> dict[str, Any]:
    """An encoder of six layers with an exit at two, a decoder of four with an exit at one."""
    segments = [
        {"first": 0, "stop": 1, "file": "segment-0.gguf", "output": "callback"},
        {"first": 1, "stop": 4, "file": "segment-1.gguf", "output": "logits"},
    ]
    encoder_segments = [
        {"first": 0, "stop": 2, "file": "encoder-0.gguf"},
        {"first": 2, "stop": 6, "file": "encoder-1.gguf"},
    ]
    model = {
        "name": "tiny",
        "architecture": "T5ForConditionalGeneration",
        "hidden_size": 64,
        "num_layers": 4,
        "vocab_size": 320,
        "context_length": 512,
        "parameters": 1000,
        "encoder": {"num_layers": 6, "exits": [2], "max_source_length": 512, "start_token_id": 0},
    }
    return {
        "device": "cpu",
        "format": "gguf",
        "model": model,
        "exits": [1],
        "encoder_segments": encoder_segments,
        "segments": segments,
        "embedding": {"file": "segment-1.gguf", "offset": 0, "rows": 320, "columns": 64, "type": "F32"},
        "quantization": {"scheme": "f32"},
        "parity": {
            "reference": 0.0,
            "reference_tolerance": 1e-3,
            "split": 0.0,
            "split_tolerance": 1e-3,
            "draft_verify": 0.0,
            "width_noise": 0.0,
            "near_tie_margin": 1e-4,
        },
        "files": [{"path": path, "size": 1, "sha256": _HASH} for path in _FILES],
        "provenance": {"source": "tiny", "tool": "test", "engine": "test", "created": "now"},
        **changes,
    }


def check(content: dict[str, Any]) -> GgufManifest:
    return GgufManifest.model_validate_json(json.dumps(content))


def test_an_encoders_files_are_among_the_contents() -> None:
    found = check(manifest())
    assert found.model.encoder == EncoderFacts(
        num_layers=6, exits=(2,), max_source_length=512, start_token_id=0
    )
    assert found.contents["encoder-1.gguf"] == "the encoder's layers 2–5"


def test_a_decoders_manifest_needs_not_a_word_about_encoders() -> None:
    plain = manifest()
    plain["model"] = {key: value for key, value in plain["model"].items() if key != "encoder"}
    del plain["encoder_segments"]
    assert check(plain).encoder_segments == ()


@pytest.mark.parametrize(
    "segments",
    [
        [],
        [{"first": 0, "stop": 6, "file": "encoder-0.gguf"}],
        [
            {"first": 0, "stop": 3, "file": "encoder-0.gguf"},
            {"first": 3, "stop": 6, "file": "encoder-1.gguf"},
        ],
        [
            {"first": 0, "stop": 2, "file": "encoder-0.gguf"},
            {"first": 2, "stop": 5, "file": "encoder-1.gguf"},
        ],
    ],
)
def test_segments_that_are_not_the_encoders_cuts_are_refused(segments: list[dict[str, Any]]) -> None:
    with pytest.raises(ValidationError, match="do not match the encoder's cuts"):
        check(manifest(encoder_segments=segments))


def test_encoder_segments_of_a_decoder_alone_are_refused() -> None:
    content = manifest()
    content["model"]["encoder"] = None
    with pytest.raises(ValidationError, match="do not match the encoder's cuts"):
        check(content)


def test_an_encoders_file_without_a_hash_is_refused() -> None:
    files = [entry for entry in manifest()["files"] if entry["path"] != "encoder-1.gguf"]
    with pytest.raises(ValidationError, match=r"files not listed with a hash: encoder-1\.gguf"):
        check(manifest(files=files))


def test_a_manifest_is_narrowed_to_its_own_format_alone() -> None:
    bundle = Bundle(Path("out"), check(manifest()))
    assert manifest_of(bundle, GgufManifest) is bundle.manifest
    with pytest.raises(BundleError, match=r"out: a bundle of format gguf, onnx was expected") as refused:
        manifest_of(bundle, OnnxManifest)
    assert refused.value.hint == "export it with --format onnx"
