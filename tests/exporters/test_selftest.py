"""The self-test finds an export that is broken on purpose, and nothing of it is kept."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from skipstone.errors import ExportError
from skipstone.exporters.formats import Oracle
from skipstone.exporters.formats.gguf import cut
from skipstone.exporters.formats.gguf.cut import Cut
from skipstone.exporters.formats.gguf.parts import GgufModel, TensorPart
from skipstone.exporters.pipeline import export_checkpoint
from skipstone.exporters.probe import Probe
from skipstone.exporters.selftest import Measured, SelfTest, _usual_difference, judge
from tests.exporters.conftest import MakeTiny


def swap_two_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(model: GgufModel, piece: Cut) -> list[TensorPart]:
        if piece.first == 0:
            return right(model, piece)
        parts = {part.name: part for part in right(model, piece)}
        other = {"blk.0.": "blk.1.", "blk.1.": "blk.0."}
        return [replace(parts[other[name[:6]] + name[6:]], name=name) for name in parts]

    right = cut._blocks
    monkeypatch.setattr(cut, "_blocks", swapped)


def leave_rotary_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut, "deinterleave_rows", lambda rows, num_heads: np.ascontiguousarray(rows))


def write_other_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cut._blocks
    monkeypatch.setattr(cut, "_blocks", lambda model, piece: right(model, replace(piece, first=1, stop=3)))


def shift_the_draft_heads_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted_head(model: GgufModel, token_ids: NDArray[np.int32], path: Path) -> None:
        right(model, np.roll(token_ids, 1), path)

    right = cut.write_draft_head
    monkeypatch.setattr(cut, "write_draft_head", shifted_head)


BREAKS = {
    "two layers swapped": swap_two_layers,
    "rotary order not undone": leave_rotary_order,
    "other layers written": write_other_layers,
    "draft head's rows shifted": shift_the_draft_heads_rows,
}


@pytest.mark.parametrize("scheme", ["f32", "q8_0"])
@pytest.mark.parametrize("fault", list(BREAKS))
def test_a_broken_export_fails_its_self_test_and_leaves_nothing(
    fault: str, scheme: str, tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BREAKS[fault](monkeypatch)
    with pytest.raises(ExportError, match="self-test: "):
        export_checkpoint(tiny("llama"), tmp_path / "out", quantize=scheme, exits=(2,))
    assert list(tmp_path.iterdir()) == []


def test_a_mapping_that_is_wrong_for_the_whole_model_is_found_through_the_reference(
    tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from skipstone.exporters.formats.gguf import whole

    monkeypatch.setattr(whole, "interleave_rows", lambda weight, _heads: weight)
    with pytest.raises(ExportError, match=r"self-test: .*reference"):
        export_checkpoint(tiny("llama"), tmp_path / "out", quantize="q8_0", exits=(2,))


def test_a_segment_that_crashes_the_engine_is_an_error_that_says_so(
    tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_windowed(model: GgufModel, piece: Cut) -> dict[str, object]:
        meta = dict(right(model, piece))
        pattern = meta["mimo2.attention.sliding_window_pattern"]
        meta["mimo2.attention.sliding_window_pattern"] = replace(pattern, value=[False] * len(pattern.value))
        return meta  # without one windowed layer llama.cpp aborts

    right = cut._nextn_meta
    monkeypatch.setattr(cut, "_nextn_meta", none_windowed)
    with pytest.raises(ExportError, match="process was killed by SIG"):
        export_checkpoint(tiny("llama"), tmp_path / "out", quantize="f32", exits=(2,))
    assert list(tmp_path.iterdir()) == []


GOOD = Measured(
    finite=True,
    spread=2.0,
    reference=1e-5,
    agreement=1.0,
    split=1e-6,
    split_rms=1e-7,
    draft_verify=1e-6,
    tree_commit=1e-6,
    width_noise=3e-4,
    jitter=1e-5,
    draft_head=1e-6,
)
EXACT = SelfTest(
    Oracle("module:Class", {}),
    Path("checkpoint"),
    Probe((1, 2)),
    min_agreement=0.99,
    reference_tolerance=1e-3,
)


@pytest.mark.parametrize(
    ("figure", "message"),
    [
        ({"finite": False}, "not finite"),
        ({"split": 2e-3}, "segments and the whole model differ by 0.002"),
        ({"split_rms": 0.5}, "rms"),
        ({"draft_verify": 2e-3}, "drafted and then verified"),
        ({"tree_commit": 2e-3}, "accepted out of trees"),
        ({"draft_head": 0.06}, "draft head"),
        ({"agreement": 0.9}, "90%, at least 99%"),
        ({"reference": 2e-3, "spread": 0.5}, "logits and the reference differ by 0.002, at most 0.001 "),
        ({"reference": 5e-3, "spread": 4.0}, "logits and the reference differ by 0.005, at most 0.004 "),
    ],
)
def test_every_figure_past_its_tolerance_is_named(figure: dict[str, float], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        judge(replace(GOOD, **figure), EXACT)


def test_logits_may_differ_from_the_reference_in_proportion_to_their_spread() -> None:
    parity = judge(replace(GOOD, reference=3e-3, spread=4.0), EXACT)
    assert parity.reference_tolerance == pytest.approx(4e-3)
    assert judge(replace(GOOD, spread=0.1), EXACT).reference_tolerance == pytest.approx(1e-3)


def test_where_activations_have_few_bits_the_artefacts_own_tolerances_are_wider() -> None:
    quantised = replace(EXACT, reference_tolerance=None)
    apart = replace(GOOD, split=0.6 * GOOD.spread, split_rms=0.15 * GOOD.spread)
    with pytest.raises(ExportError, match="segments and the whole model differ"):
        judge(apart, quantised)
    parity = judge(apart, replace(quantised, slack=2.0))
    assert parity.split_tolerance == pytest.approx(2 * judge(GOOD, quantised).split_tolerance)


def test_the_near_tie_margin_covers_twice_the_noise_between_widths_and_the_jitter() -> None:
    assert judge(GOOD, EXACT).near_tie_margin == pytest.approx(6e-4)
    assert judge(replace(GOOD, jitter=0.1), EXACT).near_tie_margin == pytest.approx(0.1)
    assert judge(replace(GOOD, width_noise=0.0), EXACT).near_tie_margin == pytest.approx(1e-4)


def test_a_single_row_gone_wrong_is_found_and_a_few_stray_logits_are_not() -> None:
    """Among quantised logits, where the largest of millions says little."""
    logits = np.zeros((64, 4096), np.float32)
    stray, wrong = logits.copy(), logits.copy()
    stray[np.arange(20), np.arange(20)] = 9.0
    wrong[17] = 0.5
    assert _usual_difference(logits, stray) == 0.0
    assert _usual_difference(logits, wrong) == 0.5
