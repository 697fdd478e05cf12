"""A smaller model in the same bundle that drafts for it: exported, checked, and lossless."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from skipstone.bundle import open_bundle
from skipstone.errors import BundleError, UsageError, VocabularyMismatchError
from skipstone.exporters.compress.recipe import parse_steps
from skipstone.exporters.compress.run import compress
from skipstone.exporters.draft_sibling import check_sibling
from skipstone.exporters.pipeline import export_checkpoint
from skipstone.model import load_model
from skipstone.runtimes.policies.auto import AutoPolicy
from skipstone.runtimes.strategies import StrategyOptions
from tests.exporters.conftest import MakeTiny
from tests.exporters.tiny import GENTLE, make_checkpoint
from tests.exporters.tiny_t5 import T5Case, make_t5

PROMPT = "def read_lines(path):\n    "


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIPSTONE_CACHE", str(tmp_path_factory.mktemp("cache")))


def sibling_of(checkpoint: Path, folder: Path, dropped: int) -> Path:
    """The checkpoint without some of its layers."""
    compress(checkpoint, folder, parse_steps([f"drop_layers:count={dropped},by=alternate"]))
    return folder


@pytest.mark.slow
@pytest.mark.engine
def test_a_pruned_sibling_of_the_shipped_model_drafts_losslessly_and_auto_may_use_it(
    coder_checkpoint: Path, tmp_path: Path
) -> None:
    sibling = sibling_of(coder_checkpoint, tmp_path / "small", 4)
    bundle = export_checkpoint(
        coder_checkpoint, tmp_path / "out", quantize="none", draft=sibling, draft_quantize="q8_0"
    )
    inner = open_bundle(bundle.path / "draft")
    assert bundle.manifest.draft_model == "draft"
    assert inner.manifest.model.num_layers == 8
    assert inner.manifest.quantization.scheme == "q8_0"
    assert inner.manifest.exits == ()
    with load_model(bundle.path, threads=1, context_length=128) as model:
        expected = model.generate(PROMPT, max_new_tokens=48, strategy="plain", ignore_eos=True)
        drafted = model.generate(PROMPT, max_new_tokens=48, strategy="draft-model", ignore_eos=True)
        assert drafted.tokens == expected.tokens
        assert drafted.stats.accepted > 10
        chosen = model.generate(PROMPT, max_new_tokens=48, strategy="auto", ignore_eos=True)
        assert chosen.tokens == expected.tokens
        policy = model.policy("auto")
        assert isinstance(policy, AutoPolicy)
        assert any(arm.endswith(f"→ {inner.manifest.model.name}") for arm in policy.record)
    damaged = next((bundle.path / "draft").glob("*.gguf"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError, match="draft"):
        open_bundle(bundle.path)


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_a_sibling_in_an_executorch_bundle_drafts_losslessly(kind: str, tmp_path: Path) -> None:
    encodes = kind != "decoder"
    checkpoint = (
        make_t5(tmp_path / "whole", T5Case({"num_layers": 1, "num_decoder_layers": 2}))
        if encodes
        else make_checkpoint(tmp_path / "whole", replace(GENTLE, config={"num_hidden_layers": 2}))
    )
    sibling = sibling_of(checkpoint, tmp_path / "small", 1)
    bundle = export_checkpoint(
        checkpoint,
        tmp_path / "out",
        format="executorch",
        quantize="none",
        draft=sibling,
        exits=(),
        context_length=96,
        max_source_length=32 if encodes else None,
    )
    inner = open_bundle(bundle.path / "draft").manifest
    assert (bundle.manifest.draft_model, inner.format) == ("draft", "executorch")
    assert inner.model.num_layers == bundle.manifest.model.num_layers - 1
    given = {"source": "the self returns"} if encodes else {"prompt": "the self"}
    with load_model(bundle.path, threads=1, context_length=96) as model:
        expected, drafted = (
            model.generate(
                **given,  # type: ignore[arg-type]
                max_new_tokens=32,
                strategy=strategy,
                options=StrategyOptions(num_assistant_tokens=4),
                ignore_eos=True,
            )
            for strategy in ("plain", "draft-model")
        )
    assert drafted.tokens == expected.tokens
    assert drafted.stats.drafted > 0


def test_siblings_that_cannot_draft_are_refused(
    tiny: MakeTiny, tiny_t5: MakeTiny, coder_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(VocabularyMismatchError, match="4096 tokens"):
        export_checkpoint(tiny("llama"), tmp_path / "out", draft=coder_checkpoint)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="a checkpoint was expected"):
        check_sibling(tiny("llama"), "small.gguf")
    with pytest.raises(UsageError, match="an encoder-decoder, and the model is a decoder alone"):
        check_sibling(tiny("llama"), tiny_t5("t5"))
    other = shutil.copytree(tiny("llama"), tmp_path / "other")
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer.json").write_text(text.replace("<tool>", "<loot>"), encoding="utf-8")
    with pytest.raises(VocabularyMismatchError, match="loot"):
        check_sibling(tiny("llama"), other)
