"""Whole benchmarks on the reference model."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from skipstone.benchmark import subject
from skipstone.benchmark.memory import MemoryRequest, own_peak_bytes, peak_rss_mb
from skipstone.benchmark.run import BenchOptions, run_bench
from skipstone.bundle import CostCurve, open_bundle
from skipstone.errors import ContextFullError, EngineError, UsageError
from skipstone.runtimes.engines.base import Engine
from skipstone.runtimes.sampling import SamplingConfig
from skipstone.runtimes.strategies import StrategyOptions
from tests.sdk.cli.command import skipstone

PROMPTS = ("def read_lines(path):\n", "class Stack:\n    def push(self, item):\n")
OPTIONS = BenchOptions(
    prompts=PROMPTS, max_new_tokens=16, repeats=2, threads=1, context_length=128, memory=False
)
KEYS = {
    "strategy", "tokens_per_second", "speedup", "min_speedup", "tokens_per_round", "acceptance_rate",
    "identical", "near_tie_divergences", "other_divergences", "ttft_ms", "peak_rss_mb", "bound",
    "bound_share", "gigabytes_per_second",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole_gguf(coder_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model uncut, in f32."""
    from skipstone.exporters.checkpoint import open_checkpoint
    from skipstone.exporters.formats.gguf.vocabulary import tokenizer_keys
    from skipstone.exporters.formats.gguf.whole import write_whole

    checkpoint = open_checkpoint(coder_checkpoint)
    target = tmp_path_factory.mktemp("whole") / "coder.gguf"
    write_whole(checkpoint, target, tokenizer=tokenizer_keys(checkpoint, checkpoint.config.vocab_size))
    return target


def test_every_strategy_has_a_row_and_says_what_plain_decoding_says(coder_bundle_f32: Path) -> None:
    report = run_bench(coder_bundle_f32, OPTIONS)
    names = [row.strategy for row in report.rows]
    assert names == ["plain", "text", "prompt-lookup", "katz", "recycling", "layerskip", "staged", "auto"]
    for row in report.rows:
        assert (row.identical, row.near_tie_divergences, row.other_divergences) == (len(PROMPTS), 0, 0)
        assert row.new_tokens == len(PROMPTS) * OPTIONS.repeats * 15
        assert row.tokens_per_second > 0
        assert row.tokens_per_round >= 1
        assert row.bound is not None
        assert row.bound > 0
    plain = report.rows[0]
    assert (plain.speedup, plain.min_speedup, plain.tokens_per_round, plain.drafted) == (1.0, 1.0, 1.0, 0)
    assert plain.bound == pytest.approx(1.0)
    drafted = {row.strategy: row for row in report.rows}
    assert drafted["layerskip"].accepted > 0
    assert drafted["layerskip"].rounds < plain.rounds


def test_plain_runs_even_if_it_was_not_asked_for_and_names_count_once(coder_bundle_f32: Path) -> None:
    options = replace(OPTIONS, strategies=("recycling", "recycling"), repeats=1)
    report = run_bench(coder_bundle_f32, options)
    assert [row.strategy for row in report.rows] == ["plain", "recycling"]


def test_when_sampling_the_outputs_are_not_compared(coder_bundle_f32: Path) -> None:
    sampling = SamplingConfig(temperature=1.0)
    report = run_bench(coder_bundle_f32, replace(OPTIONS, strategies=("recycling",), sampling=sampling))
    assert {row.identical for row in report.rows} == {None}
    assert report.temperature == 1.0


def even_curve(engine: Engine, budget_seconds: float) -> CostCurve:
    """A machine where every call of a segment takes a millisecond, whatever its width."""
    return CostCurve(
        widths=(1, 64),
        segments=((1e-3, 1e-3),) * len(engine.exits),
        draft_head=(1e-3, 1e-3),
        threads=1,
        machine="even",
    )


def test_a_draft_model_is_measured_too_and_its_costs_are_in_the_bound(
    coder_bundle_f32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "measure", even_curve)
    options = replace(
        OPTIONS,
        strategies=("draft-model",),
        assistant_model=str(coder_bundle_f32),
        repeats=1,
        strategy_options=StrategyOptions(num_assistant_tokens=3),
    )
    plain, drafted = run_bench(coder_bundle_f32, options).rows
    assert drafted.identical == len(PROMPTS)
    assert plain.bound == pytest.approx(1.0)
    assert drafted.drafted > 0
    assert drafted.bound is not None
    assert drafted.bound <= 0.5 * drafted.tokens_per_round  # the draft is the model itself: a call for a call


def test_a_strategy_that_cannot_run_is_refused(coder_bundle_f32: Path) -> None:
    with pytest.raises(UsageError, match="draft-model"):
        run_bench(coder_bundle_f32, replace(OPTIONS, strategies=("draft-model",)))
    with pytest.raises(ContextFullError, match="prompt 2"):
        run_bench(coder_bundle_f32, replace(OPTIONS, prompts=("a", "word " * 200)))


@pytest.mark.slow
@pytest.mark.engine
def test_k_and_v_of_four_bits_have_a_margin_of_their_own(
    coder_bundle_f32: Path, whole_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured with them in full precision says nothing of them. The baseline keeps them likewise, but the
    uncut model has the values of K in another order, and rounds them otherwise.
    """
    monkeypatch.setattr(subject, "measure", even_curve)
    options = replace(OPTIONS, strategies=("staged",), repeats=1, kv_type="q4_0")
    report = run_bench(coder_bundle_f32, replace(options, baselines=True, whole_gguf=whole_gguf))
    rows = {row.strategy: row for row in report.rows}
    assert {"plain", "staged", "llama_decode"} <= set(rows)
    assert report.kv_type == "q4_0"
    assert report.bundle.near_tie_margin > 10 * open_bundle(coder_bundle_f32).manifest.near_tie_margin
    assert rows["staged"].other_divergences == 0
    assert rows["staged"].accepted > 0


@pytest.mark.slow
@pytest.mark.engine
def test_the_control_is_plain_decoding_over_again(coder_bundle_f32: Path) -> None:
    options = replace(OPTIONS, strategies=("staged",), control=True, memory=True)
    plain, _staged, again = run_bench(coder_bundle_f32, options).rows
    assert (plain.strategy, again.strategy) == ("plain", "plain-again")
    assert (again.drafted, again.rounds, again.identical) == (0, plain.rounds, len(PROMPTS))
    assert again.speedup != 1.0, "measured by itself"
    assert again.peak_rss_mb is not None


def test_the_baselines_say_the_same_and_have_rows(coder_bundle_f32: Path, whole_gguf: Path) -> None:
    options = replace(
        OPTIONS,
        strategies=("plain",),
        baselines=True,
        whole_gguf=whole_gguf,
        memory=True,
        ignore_eos=False,  # create_completion cannot ignore it
    )
    report = run_bench(coder_bundle_f32, options)
    rows = {row.strategy: row for row in report.rows}
    assert list(rows) == ["plain", "llama_decode", "create_completion"]
    assert rows["llama_decode"].identical == len(PROMPTS)
    assert rows["create_completion"].identical is None
    assert rows["create_completion"].new_tokens == rows["plain"].new_tokens
    assert all(row.speedup is not None and row.speedup > 0 for row in report.rows)
    assert all(row.peak_rss_mb is not None and row.peak_rss_mb > 20 for row in report.rows)


def test_a_whole_gguf_of_another_vocabulary_or_without_a_tokenizer_is_refused(
    coder_bundle_f32: Path,
) -> None:
    segment = coder_bundle_f32 / "segment-0.gguf"  # a GGUF, but no model with a tokenizer
    with pytest.raises(UsageError, match="no tokens with text"):
        run_bench(coder_bundle_f32, replace(OPTIONS, baselines=True, whole_gguf=segment))


@pytest.mark.slow
@pytest.mark.engine
def test_the_command_writes_the_report_for_machines_and_a_table_for_people(
    coder_bundle_q8_0: Path, tmp_path: Path
) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.json"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    arguments = (
        "--prompts",
        prompts,
        "--strategies",
        "plain,layerskip,staged,auto",
        "--max-new-tokens",
        "12",
    )
    more = ("--json", out, "--threads", "1", "--repeats", "1")
    done = skipstone("bench", coder_bundle_q8_0, *arguments, *more)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert [row["strategy"] for row in report["rows"]] == ["plain", "layerskip", "staged", "auto"]
    for row in report["rows"]:
        assert row.keys() >= KEYS
        counted = row["identical"] + row["near_tie_divergences"] + row["other_divergences"]
        assert counted == len(PROMPTS)
        assert row["other_divergences"] == 0
        assert row["peak_rss_mb"] > 20
        assert row["strategy"] in done.stdout
    assert report["threads"] == 1
    assert report["bundle"]["quantization"] == "q8_0"
    assert report["machine"]["processor"]
    assert report["command"][:2] == ["skipstone", "bench"]
    assert len(report["cost"]["segments"]) == len(report["bundle"]["exits"]) + 1


REQUEST = MemoryRequest(
    bundle="", strategy="plain", prompt=(5, 6, 7), source=(), max_new_tokens=4, threads=1, context_length=64
)


@pytest.mark.engine
def test_peak_memory_is_that_of_the_process_measured_and_not_of_this_one(coder_bundle_f32: Path) -> None:
    ballast = bytearray(b"x" * (400 << 20))  # a parent's peak must not be handed down
    measured = peak_rss_mb(replace(REQUEST, bundle=str(coder_bundle_f32)))
    assert own_peak_bytes() / 1e6 > len(ballast) / 1e6
    weights = sum(path.stat().st_size for path in coder_bundle_f32.glob("*.gguf")) / 1e6
    assert weights < measured < weights + 350


@pytest.mark.engine
def test_a_process_that_fails_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no such folder"):
        peak_rss_mb(replace(REQUEST, bundle=str(tmp_path / "nothing")))


def test_a_report_is_plain_json(coder_bundle_f32: Path) -> None:
    report = run_bench(coder_bundle_f32, replace(OPTIONS, strategies=("recycling",), repeats=1))
    record = json.loads(json.dumps(report.as_json()))
    assert record["rows"][1]["strategy"] == "recycling"
    assert record["bundle"]["model"] == asdict(report)["bundle"]["model"]
    assert record["cost"]["widths"] == list(report.cost.widths)
