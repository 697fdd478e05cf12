"""What can be evaluated, what cannot, and where a pruned model's exits lie in the dense one."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from skipstone.bundle import Compression, ModelSize
from skipstone.errors import BundleError, CheckpointError, SkipstoneError, UsageError, VocabularyMismatchError
from skipstone.evaluation.subjects import Subject, check_alike, find_subject
from tests.exporters.tiny import CASES, make_checkpoint
from tests.exporters.tiny_t5 import T5_CASES, make_t5

_SIZE = ModelSize(parameters=1, nonzero=1, num_bytes=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "llama", CASES["llama"])


@pytest.fixture(scope="module")
def dense(checkpoint: Path) -> Subject:
    return find_subject(str(checkpoint))


def test_a_checkpoint_tells_its_own_facts(dense: Subject, checkpoint: Path) -> None:
    assert (dense.format, dense.quantization, dense.is_bundle) == ("checkpoint", "float32", False)
    assert dense.exits == (1,)  # by depth, none are recorded
    names = ("model.safetensors", "config.json", "tokenizer.json")
    assert dense.bytes == sum((checkpoint / name).stat().st_size for name in names)
    assert dense.dense_exits(dense) == (1,)


def test_exits_of_a_pruned_model_are_found_by_what_was_kept(dense: Subject) -> None:
    assert dense.sha256 is not None
    record = Compression(
        source="x", source_sha256=dense.sha256, before=_SIZE, steps=(), kept={"decoder": (1, 3)}
    )
    facts = dense.facts.model_copy(update={"num_layers": 2})
    pruned = replace(dense, facts=facts, exits=(1,), compression=record)
    assert pruned.dense_exits(dense) == (2,)  # the first layer kept is the dense model's second
    of_another = replace(pruned, compression=record.model_copy(update={"source_sha256": "0" * 64}))
    assert of_another.dense_exits(dense) == (None,)
    assert replace(pruned, compression=None).dense_exits(dense) == (None,)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda folder: str(folder), BundleError, "neither a bundle .* nor a checkpoint"),
        (lambda folder: str(folder / "nowhere"), CheckpointError, "no such folder"),
        (lambda folder: str(folder / "model.gguf"), UsageError, "a .gguf file is no bundle"),
    ],
)
def test_what_is_neither_bundle_nor_checkpoint_is_refused(
    make, error: type[SkipstoneError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        find_subject(make(tmp_path))


def test_models_of_other_vocabularies_or_kinds_are_refused(dense: Subject, tmp_path: Path) -> None:
    larger = replace(dense, facts=dense.facts.model_copy(update={"vocab_size": 400}))
    with pytest.raises(VocabularyMismatchError, match="a vocabulary of 400 tokens"):
        check_alike(larger, dense)
    swapped = tmp_path / "swapped"
    shutil.copytree(dense.path, swapped)
    tokenizer = json.loads((swapped / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (swapped / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(VocabularyMismatchError, match="token 'A' is another"):
        check_alike(find_subject(str(swapped)), dense)
    corrector = find_subject(str(make_t5(tmp_path / "t5", T5_CASES["t5"])))
    with pytest.raises(UsageError, match="one is an encoder-decoder"):
        check_alike(corrector, dense)
