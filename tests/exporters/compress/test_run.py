"""Recipes carried out: what is written, what is kept, and what goes on where it was cut off."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from skipstone.errors import UsageError
from skipstone.exporters.checkpoint import load_eager
from skipstone.exporters.compress.depth import DropLayers
from skipstone.exporters.compress.recipe import parse_steps
from skipstone.exporters.compress.record import RECORD_FILE, read_record
from skipstone.exporters.compress.run import compress
from skipstone.exporters.compress.sparsify.step import Sparsify
from tests.exporters.compress.models import logits
from tests.exporters.conftest import MakeTiny

STEPS = parse_steps(["drop_layers:count=1", "sparsify:sparsity=0.3"])
LEARNED = ("model.safetensors", "config.json")


def cut_off(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_a_run_that_was_cut_off_goes_on_behind_its_last_step_bit_for_bit(
    tiny: MakeTiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Sparsify, "apply", cut_off)
        with pytest.raises(KeyboardInterrupt):
            compress(tiny("llama"), tmp_path / "resumed", STEPS, calibration=text)
    assert not (tmp_path / "resumed").exists()
    with monkeypatch.context() as patch:
        patch.setattr(DropLayers, "apply", cut_off)  # is not run again
        resumed = compress(tiny("llama"), tmp_path / "resumed", STEPS, calibration=text)
    monkeypatch.setenv("SKIPSTONE_CACHE", str(tmp_path / "other"))
    at_once = compress(tiny("llama"), tmp_path / "at-once", STEPS, calibration=text)
    for name in LEARNED:
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "at-once" / name).read_bytes()
    without_times = {"steps": {"__all__": {"seconds"}}}
    assert resumed.model_dump(exclude=without_times) == at_once.model_dump(exclude=without_times)


def test_another_recipe_another_text_and_another_checkpoint_start_anew(
    tiny: MakeTiny, text: Path, tmp_path: Path, own_cache: Path
) -> None:
    compress(tiny("llama"), tmp_path / "first", STEPS[:1], calibration=text)
    assert len(list(own_cache.iterdir())) == 1
    compress(tiny("llama"), tmp_path / "second", STEPS, calibration=text)
    assert len(list(own_cache.iterdir())) == 2
    text.write_text(text.read_text(encoding="utf-8") + "More.\n", encoding="utf-8")
    compress(tiny("llama"), tmp_path / "third", STEPS[:1], calibration=text)
    compress(tiny("qwen-3"), tmp_path / "fourth", STEPS[:1], calibration=text)
    assert len(list(own_cache.iterdir())) == 4


def test_the_folder_is_what_the_steps_made_and_is_compressed_further(
    tiny: MakeTiny, text: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    model = load_eager(tiny("llama"))
    model.save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((tiny("llama") / name).read_bytes())
    (source / "exits.json").write_text('{"exits": [1, 3]}', encoding="utf-8")
    (source / "token_frequencies.json").write_text("{}", encoding="utf-8")

    record = compress(source, tmp_path / "out", parse_steps(["drop_layers:layers=1"]), calibration=text)
    small = load_eager(tmp_path / "out")
    assert len(small.model.layers) == 3
    assert torch.equal(small.model.layers[1].mlp.up_proj.weight, model.model.layers[2].mlp.up_proj.weight)
    assert json.loads((tmp_path / "out" / "exits.json").read_text(encoding="utf-8")) == {"exits": [1, 2]}
    assert (tmp_path / "out" / "token_frequencies.json").is_file()
    assert read_record(tmp_path / "out") == record
    (step,) = record.steps
    assert step.size.parameters == sum(weight.numel() for weight in small.parameters())
    assert record.kept == {"decoder": (0, 2, 3)}

    again = compress(tmp_path / "out", tmp_path / "again", STEPS[1:], calibration=text)
    assert again.earlier == record.steps
    zeros = again.before.nonzero - again.steps[0].size.nonzero
    blocks = sum(weight.numel() for weight in small.model.layers.parameters() if weight.dim() == 2)
    assert zeros / blocks == pytest.approx(0.3, abs=0.01)


def test_fidelity_is_that_of_transformers_own_logits(tiny: MakeTiny, text: Path, tmp_path: Path) -> None:
    record = compress(
        tiny("llama"), tmp_path / "out", parse_steps(["drop_layers:layers=2"]), calibration=text
    )
    found = record.steps[0].fidelity
    assert found is not None
    small, dense = load_eager(tmp_path / "out"), load_eager(tiny("llama"))
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(tiny("llama") / "tokenizer.json")).encode(text.read_text("utf-8")).ids
    limit = min(512, small.config.max_position_embeddings)
    windows = [torch.tensor([ids[start : start + limit]]) for start in range(0, len(ids), limit)]
    loss = divergence = agreed = count = 0.0
    with torch.no_grad():
        for window in (window for window in windows if window.shape[1] > 1):
            mine, other = (model(window).logits[0, :-1] for model in (small, dense))
            loss += float(functional.cross_entropy(mine, window[0, 1:], reduction="sum"))
            divergence += float(
                functional.kl_div(
                    mine.log_softmax(-1), other.log_softmax(-1), reduction="sum", log_target=True
                )
            )
            agreed += float((mine.argmax(-1) == other.argmax(-1)).sum())
            count += window.shape[1] - 1
    assert found.tokens == count
    assert found.perplexity == pytest.approx(torch.tensor(loss / count).exp().item(), rel=1e-4)
    assert found.kl_divergence == pytest.approx(divergence / count, rel=1e-3)
    assert found.agreement == pytest.approx(agreed / count)


def test_an_encoder_decoder_loses_layers_of_both_stacks(
    tiny_t5: MakeTiny, pairs: Path, tmp_path: Path
) -> None:
    steps = parse_steps(["drop_layers:count=1,stack=encoder", "drop_layers:count=1,by=top"])
    record = compress(tiny_t5("t5"), tmp_path / "out", steps, calibration=pairs)
    before, small = load_eager(tiny_t5("t5")).config, load_eager(tmp_path / "out").config
    assert (small.num_layers, small.num_decoder_layers) == (
        before.num_layers - 1,
        before.num_decoder_layers - 1,
    )
    assert record.steps[1].fidelity is not None
    assert len(logits(load_eager(tmp_path / "out"))) > 0


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([], "no step to take"),
        (["drop_layers:count=1"], "drop_layers: needs a text"),
        (
            ["drop_layers:count=2,by=top", "drop_layers:count=2,by=top"],
            "2 layers cannot go from a decoder of 2",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    steps: list[str], words: str, tiny: MakeTiny, tmp_path: Path, own_cache: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        compress(tiny("llama"), tmp_path / "out", parse_steps(steps))
    assert not (tmp_path / "out").exists()
    assert not own_cache.exists()


def test_only_a_compressed_checkpoint_is_replaced(tiny: MakeTiny, tmp_path: Path) -> None:
    from skipstone.errors import BundleError

    steps = parse_steps(["drop_layers:count=1,by=top"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="not a compressed checkpoint"):
        compress(tiny("llama"), tmp_path / "out", steps, overwrite=True)
    (tmp_path / "out" / "thesis.txt").unlink()
    compress(tiny("llama"), tmp_path / "out", steps)
    with pytest.raises(BundleError, match="already holds a compressed checkpoint"):
        compress(tiny("llama"), tmp_path / "out", steps)
    compress(tiny("llama"), tmp_path / "out", steps, overwrite=True)
    assert (tmp_path / "out" / RECORD_FILE).is_file()


@pytest.mark.parametrize(
    "options",
    ["over=drop,target_size=85%", "over=sparsity,sparsity=0.3", "over=bits,scheme=q4_0,target_size=25%"],
)
def test_a_search_is_a_step_of_a_recipe_and_its_record_is_read_back(
    options: str, tiny: MakeTiny, text: Path, tmp_path: Path
) -> None:
    steps = parse_steps([f"search:{options},generations=2,offspring=2,tokens=256"])
    record = compress(tiny("llama"), tmp_path / "small", steps, calibration=text)
    assert read_record(tmp_path / "small") == record
    (step,) = record.steps
    chosen, history = step.details["chosen"], step.details["history"]
    assert isinstance(chosen, list)
    assert chosen
    assert isinstance(history, list)
    assert len(history) == 2
    assert step.fidelity is not None
    assert step.fidelity.kl_divergence == pytest.approx(step.details["kl_divergence"], rel=0.5)
