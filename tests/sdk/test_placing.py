"""Placing segments of a model on the engines of other bundles, from Python and on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import skipstone
from skipstone import placing
from skipstone.benchmark.meter import PartBytes, part_bytes, placed_bytes
from skipstone.benchmark.run import BenchOptions, run_bench
from skipstone.bundle import Bundle, CostCurve, open_bundle
from skipstone.devices.traces import Round, Run, Trace, trace_lines
from skipstone.errors import BundleError, UsageError
from skipstone.model import Model, load_model
from skipstone.placing import open_places, parse_place
from skipstone.runtimes.engines import EngineOptions
from skipstone.runtimes.engines.placed import PlacedEngine
from tests.devices.timed import curve_of, trace_of
from tests.sdk.cli.command import assert_refused
from tests.sdk.cli.command import skipstone as command

PROMPT = "def read_lines(path):\n"
NEW = 24
OPTIONS = EngineOptions(threads=1)


@pytest.fixture
def gguf(coder_bundle_f32: Path) -> Bundle:
    return open_bundle(coder_bundle_f32, verify_hashes=False)


def opened_owners(bundle: Bundle, place: dict[int | str, Any]) -> tuple[int, ...]:
    opened = open_places(bundle, OPTIONS, place)
    opened.engine.close()
    assert opened.placement is not None
    return opened.placement.owners


@pytest.mark.parametrize("text", ["0", "=out", "0=", ""])
def test_a_placement_that_is_none_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(UsageError, match="expected SEGMENT=DIR"):
        parse_place([text])


def test_the_command_lines_placements_are_read() -> None:
    assert parse_place(["0=a", "1-2=b=c"]) == {"0": "a", "1-2": "b=c"}
    with pytest.raises(UsageError, match="0 is placed twice"):
        parse_place(["0=a", "0=b"])


@pytest.mark.engine
@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("first", "no segment and no range"),
        ("-1", "no segment and no range"),
        (-1, "no segment and no range"),
        ("1-", "no segment and no range"),
        ("0x1", "no segment and no range"),
        (9, "this bundle's segments are 0 to 1"),
        ("2-1", "this bundle's segments are 0 to 1"),
        ("1-9", "this bundle's segments are 0 to 1"),
    ],
)
def test_a_segment_that_is_not_there_is_refused(
    gguf: Bundle, where: int | str, said: str, coder_bundle_q8_0: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        open_places(gguf, OPTIONS, {where: coder_bundle_q8_0})


@pytest.mark.engine
def test_a_segment_placed_twice_is_refused(gguf: Bundle, coder_bundle_q8_0: Path) -> None:
    with pytest.raises(UsageError, match="segment 1 is placed twice"):
        open_places(gguf, OPTIONS, {"0-1": coder_bundle_q8_0, 1: coder_bundle_q8_0})
    with pytest.raises(UsageError, match="does not go with named segments"):
        open_places(gguf, OPTIONS, {"auto": coder_bundle_q8_0, 1: coder_bundle_q8_0})


def test_a_range_is_all_its_segments() -> None:
    assert placing._segments("1-3", "other", 5) == {1, 2, 3}
    assert placing._segments("4", "other", 5) == placing._segments(4, "other", 5) == {4}


@pytest.mark.engine
def test_segments_and_ranges_name_their_owners(
    gguf: Bundle, coder_bundle_q8_0: Path, coder_bundle_q4_0: Path
) -> None:
    assert opened_owners(gguf, {0: coder_bundle_q8_0}) == (1, 0)
    assert opened_owners(gguf, {"0-1": coder_bundle_q8_0}) == (1, 1)
    assert opened_owners(gguf, {"0": coder_bundle_q8_0, "1": coder_bundle_q8_0}) == (1, 1)
    assert opened_owners(gguf, {0: coder_bundle_q8_0, 1: coder_bundle_q4_0}) == (1, 2)
    assert opened_owners(gguf, {0: gguf.path, 1: coder_bundle_q8_0}) == (0, 1)


@pytest.mark.engine
def test_a_folder_that_is_no_bundle_is_refused(gguf: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a bundle"):
        open_places(gguf, OPTIONS, {0: tmp_path})


@pytest.mark.engine
def test_the_margin_and_the_parts_are_those_of_the_bundles_that_run(
    gguf: Bundle, coder_bundle_q4_0: Path
) -> None:
    opened = open_places(gguf, OPTIONS, {0: coder_bundle_q4_0})
    margin = open_bundle(coder_bundle_q4_0).manifest.near_tie_margin
    assert opened.near_tie_margin == max(margin, gguf.manifest.near_tie_margin) == margin
    segments, head = opened.part_owners
    assert [bundle.path.name for bundle in (*segments, head)] == ["q4_0", "f32", "q4_0"]
    opened.engine.close()


def curve(*parts: tuple[float, float]) -> CostCurve:
    widths = (1, 2, 4, 8, 16)
    return CostCurve(
        widths=widths,
        segments=tuple(tuple((one + more * (width - 1)) * 1e-3 for width in widths) for one, more in parts),
        draft_head=(5e-5,) * len(widths),
        threads=1,
        machine="made up",
    )


QUICK, WIDE = curve((1, 1), (9, 9)), curve((4, 0), (9.5, 0))


def hopeless(bundle: Bundle) -> Trace:
    """A trace of the bundle's model in which no exit was ever right."""
    exits, drawn = (*bundle.manifest.exits, bundle.manifest.model.num_layers), 30
    plain = Round(drafter="", fresh=1, seconds=1e-3, engine_seconds=1e-3)
    run = Run(
        strategy="plain",
        prompt=0,
        tokens=tuple(range(drawn + 1)),
        rounds=(plain,) * drawn,
        ranks=((-1,) * drawn,) * (len(exits) - 1),
    )
    device = curve_of(1e-3, 1e-3, 0.1, segments=len(exits)).model_copy(update={"exits": exits})
    found = trace_of(device, run)
    return Trace(found.header.model_copy(update={"model": bundle.manifest.model.name}), found.runs)


@pytest.mark.engine
def test_auto_places_segments_as_a_trace_has_it(
    gguf: Bundle, coder_bundle_q8_0: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of drafts that are never right no second engine makes anything; the estimate has it otherwise, see below."""
    curves = {"f32": QUICK, "q8_0": WIDE}
    monkeypatch.setattr(placing, "_curve", lambda bundle, _options: curves[bundle.path.name])
    trace, file = hopeless(gguf), tmp_path / "trace.jsonl"
    file.write_text("".join(f"{line}\n" for line in trace_lines(trace)))
    place = {"auto": coder_bundle_q8_0, "trace": file}
    with load_model(gguf.path, threads=1, place=place) as model:
        assert model.opened.described == (
            model.opened.described[0],
            f"acceptance: exits 0%, text 40%, as recorded in {file}",
        )
    other = Trace(trace.header.model_copy(update={"model": "another"}), trace.runs)
    file.write_text("".join(f"{line}\n" for line in trace_lines(other)))
    with pytest.raises(UsageError, match=r"--place trace=.*: recorded of another, cut at layers 3, .* is "):
        open_places(gguf, OPTIONS, place)
    with pytest.raises(
        UsageError, match=r"trace is no segment .*auto=DIR, with that also --place trace=FILE"
    ):
        open_places(gguf, OPTIONS, {"trace": file})


@pytest.mark.engine
def test_auto_places_segments_as_the_curves_have_it(
    gguf: Bundle, coder_bundle_q8_0: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick, wide = QUICK, WIDE
    monkeypatch.setattr(placing, "kept_acceptance", lambda _bundle: None)
    for here, there, owners in ((quick, wide, (0, 1)), (wide, quick, (1, 0)), (quick, quick, (0, 0))):
        curves = {"f32": here, "q8_0": there}
        monkeypatch.setattr(placing, "_curve", lambda bundle, _options, c=curves: c[bundle.path.name])
        opened = open_places(gguf, OPTIONS, {"auto": coder_bundle_q8_0})
        assert opened.placement is not None
        assert opened.placement.owners == owners
        assert isinstance(opened.engine, PlacedEngine)
        assert opened.engine.drafts == owners[0]
        assert opened.described[-1].endswith("estimated from the exits' depth")
        opened.engine.close()


@pytest.mark.slow
@pytest.mark.engine
def test_auto_measures_both_engines_and_generates(coder_bundle_f32: Path, coder_bundle_q8_0: Path) -> None:
    with load_model(coder_bundle_f32, threads=1, place={"auto": coder_bundle_q8_0}) as model:
        result = model.generate(PROMPT, max_new_tokens=NEW)
    assert len(result.stats.placement) >= 1
    assert result.text


@pytest.fixture(scope="module")
def placed(coder_bundle_f32: Path, coder_bundle_executorch: Path) -> Any:
    """ExecuTorch drafts, llama.cpp verifies."""
    with skipstone.load(coder_bundle_f32, threads=1, place={0: coder_bundle_executorch}) as model:
        yield model


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize("strategy", ["plain", "layerskip", "staged", "auto"])
def test_two_engines_in_f32_say_what_one_says(placed: Model, coder_bundle_f32: Path, strategy: str) -> None:
    with load_model(coder_bundle_f32, threads=1) as model:
        expected = model.generate(PROMPT, max_new_tokens=NEW, strategy="plain")
    result = placed.generate(PROMPT, max_new_tokens=NEW, strategy=strategy)
    assert result.tokens == expected.tokens
    assert result.stats.placement == (
        "segment 0 (layers 0–2): executorch, none/",
        f"segment 1 (layers 3–{placed.engine.exits[-1] - 1}): gguf, f32/",
    )
    assert expected.stats.placement == ()


@pytest.mark.slow
@pytest.mark.engine
def test_the_curve_of_a_placement_is_kept_apart_from_that_of_its_bundle(
    placed: Model, coder_bundle_f32: Path
) -> None:
    from skipstone.devices.curves import curve_key, kept_curves

    bundle = open_bundle(coder_bundle_f32)
    key = curve_key(bundle, placed.engine, OPTIONS)
    assert key.placement
    assert placed.costs.plain > 0
    kept = [found.content.key for found in kept_curves(bundle) if found.content is not None]
    assert key in kept


@pytest.mark.slow
@pytest.mark.engine
def test_the_command_line_says_what_ran_where(coder_bundle_f32: Path, coder_bundle_executorch: Path) -> None:
    flags = ("--prompt", PROMPT, "--max-new-tokens", "8", "--threads", "1", "--strategy", "layerskip")
    place = ("--place", f"1={coder_bundle_executorch}")
    done = command("generate", coder_bundle_f32, *flags, *place)
    assert done.returncode == 0, done.stderr
    assert "[segment 0 (layers 0–2): gguf, f32/]" in done.stderr
    assert "[segment 1 (layers 3–" in done.stderr
    assert "): executorch, none/]" in done.stderr
    record = json.loads(command("generate", coder_bundle_f32, *flags, *place, "--json").stdout)
    assert record["text"] + "\n" == done.stdout
    assert len(record["stats"]["placement"]) == 2


@pytest.mark.engine
def test_the_command_line_refuses_in_one_line(coder_bundle_f32: Path, tmp_path: Path) -> None:
    flags = ("generate", coder_bundle_f32, "--prompt", PROMPT)
    assert_refused(command(*flags, "--place", "0"), "--place 0", "expected SEGMENT=DIR")
    assert_refused(command(*flags, "--place", f"7={coder_bundle_f32}"), "segments are 0 to 1")
    assert_refused(command(*flags, "--place", f"0={tmp_path / 'none'}"), "no such folder")


@pytest.mark.slow
@pytest.mark.engine
def test_a_benchmark_of_two_bundles_says_so_and_weighs_their_own_parts(
    gguf: Bundle, coder_bundle_q4_0: Path
) -> None:
    options = BenchOptions(
        ("layerskip",), (PROMPT,), max_new_tokens=8, repeats=1, threads=1, place={0: coder_bundle_q4_0}
    )
    report = run_bench(gguf.path, options)
    assert [line.partition(" (")[0] for line in report.placement] == ["segment 0", "segment 1"]
    assert report.bundle.near_tie_margin == open_bundle(coder_bundle_q4_0).manifest.near_tie_margin
    assert all(row.peak_rss_mb for row in report.rows), "the process that measures memory places them too"
    assert not any(row.other_divergences for row in report.rows)
    quantised = part_bytes(open_bundle(coder_bundle_q4_0))
    sizes = placed_bytes((open_bundle(coder_bundle_q4_0), gguf), gguf)
    assert sizes == PartBytes(
        (quantised.segments[0], part_bytes(gguf).segments[1]), part_bytes(gguf).draft_head
    )


@pytest.mark.engine
def test_a_curve_is_measured_of_one_bundle_alone(coder_bundle_f32: Path) -> None:
    done = command("bench", coder_bundle_f32, "--curve-only", "--place", f"0={coder_bundle_f32}")
    assert_refused(done, "--curve-only: measures one bundle")
