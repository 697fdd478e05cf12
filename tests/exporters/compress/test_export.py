"""Compressed checkpoints exported: smaller, as lossless as any, and with a record of what was done."""

from collections.abc import Sequence
from pathlib import Path

import pytest

import skipstone
from skipstone.bundle import Bundle, open_bundle
from skipstone.errors import UsageError
from skipstone.exporters.compress.recipe import parse_steps
from skipstone.exporters.compress.record import read_record
from skipstone.exporters.compress.run import compress
from skipstone.exporters.formats import Step
from skipstone.exporters.pipeline import export_checkpoint
from skipstone.runtimes.strategies import StrategyOptions
from tests.exporters.conftest import MakeTiny

PROMPTS = ("def read_lines(path):\n    with open(path) as file:\n", "class Stack:\n    def __init__(self):\n")


def size(bundle: Bundle) -> int:
    return sum(entry.size for entry in bundle.manifest.files)


def assert_strategies_agree(folder: Path, prompts: Sequence[str]) -> None:
    """Drafts are made, some are accepted, and what is generated is what plain decoding generates, in f32."""
    accepted, options = 0, StrategyOptions(num_assistant_tokens=3)
    with skipstone.load(folder, threads=1) as model:
        for prompt in prompts:
            plain = model.generate(prompt, max_new_tokens=32, strategy="plain", ignore_eos=True)
            for strategy in ("layerskip", "staged"):
                found = model.generate(
                    prompt, max_new_tokens=32, strategy=strategy, options=options, ignore_eos=True
                )
                assert found.tokens == plain.tokens
                accepted += found.stats.accepted
    assert accepted > 0


def test_an_export_with_steps_is_the_export_of_the_compressed_checkpoint(
    tiny: MakeTiny, text: Path, tmp_path: Path
) -> None:
    steps = parse_steps(["drop_layers:count=1", "prune_width:keep=64"])
    flags = {"format": "gguf", "quantize": "f32", "exits": (1,)}
    record = compress(tiny("llama"), tmp_path / "small", steps, calibration=text)
    expected = export_checkpoint(tmp_path / "small", tmp_path / "expected", **flags).manifest  # type: ignore[arg-type]
    told: list[Step] = []
    found = export_checkpoint(
        tiny("llama"),
        tmp_path / "found",
        compress=steps,
        compress_text=text,
        progress=told.append,
        **flags,  # type: ignore[arg-type]
    ).manifest
    assert {file.path: file.sha256 for file in found.files} == {
        file.path: file.sha256 for file in expected.files
    }
    assert told[0].name == "compress"
    assert (found.model.num_layers, found.model.name) == (3, tiny("llama").name)
    assert found.provenance.source == str(tiny("llama"))
    assert expected.compression == read_record(tmp_path / "small") == record
    assert found.compression is not None
    assert [step.kind for step in found.compression.steps] == ["drop_layers", "prune_width"]
    assert [step.size for step in found.compression.steps] == [step.size for step in record.steps]
    assert open_bundle(tmp_path / "found").manifest == found
    assert not list((tmp_path / "found").glob(".*"))


def test_steps_that_a_format_cannot_carry_leave_nothing_behind(tiny: MakeTiny, tmp_path: Path) -> None:
    output = tmp_path / "outputs" / "out"
    steps = parse_steps(["drop_layers:layers=2"])
    with pytest.raises(UsageError, match="every 4th layer"):
        export_checkpoint(tiny("smollm-3"), output, format="gguf", compress=steps)
    with pytest.raises(UsageError, match="needs a text to learn from") as caught:
        export_checkpoint(tiny("llama"), output, compress=parse_steps(["drop_layers:count=1"]))
    assert "--compress-text" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="'quantize' fixes codes"):
        export_checkpoint(tiny("llama"), output, compress=parse_steps(["quantize:scheme=q8_0"]))
    with pytest.raises(UsageError, match=r"--compress-text .*no step"):
        export_checkpoint(tiny("llama"), output, compress_text=tmp_path / "text.txt")
    assert not output.parent.exists() or not list(output.parent.iterdir())


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize(
    "steps",
    [
        ["drop_layers:count=3,by=symmetric"],
        ["prune_heads:count=1,by=magnitude,refit=false", "prune_width:share=0.25,by=magnitude,refit=false"],
    ],
    ids=["depth", "width"],
)
def test_a_compressed_model_in_gguf_is_smaller_and_every_strategy_says_what_plain_decoding_says(
    steps: list[str], coder_checkpoint: Path, coder_bundle_f32: Path, tmp_path: Path
) -> None:
    bundle = export_checkpoint(
        coder_checkpoint, tmp_path / "out", quantize="f32", compress=parse_steps(steps)
    )
    assert size(bundle) < 0.9 * size(open_bundle(coder_bundle_f32))
    assert_strategies_agree(tmp_path / "out", PROMPTS)


@pytest.mark.slow
@pytest.mark.engine
def test_a_compressed_model_in_executorch_is_smaller_and_every_strategy_says_what_plain_decoding_says(
    tiny: MakeTiny, tmp_path: Path
) -> None:
    flags = {"format": "executorch", "quantize": "none", "exits": (1,), "context_length": 64}
    whole = export_checkpoint(tiny("gentle"), tmp_path / "whole", **flags)  # type: ignore[arg-type]
    steps = parse_steps(["drop_layers:layers=2", "prune_width:keep=64,by=magnitude,refit=false"])
    bundle = export_checkpoint(tiny("gentle"), tmp_path / "out", compress=steps, **flags)  # type: ignore[arg-type]
    assert size(bundle) < size(whole)
    assert bundle.manifest.model.num_layers == whole.manifest.model.num_layers - 1
    assert_strategies_agree(tmp_path / "out", ["A river is never"])
