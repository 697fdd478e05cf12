"""What the comparisons with other systems share: the model, the prompts, turns, and the record."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress as Bar
from rich.table import Table

from skipstone.benchmark.lossless import first_difference
from skipstone.benchmark.measure import Progress, Runner, Sample, Series, StrategyRunner, measure_interleaved
from skipstone.benchmark.prompts import Texts, read_prompts
from skipstone.benchmark.report import this_machine, write_json
from skipstone.benchmark.rows import make_row, seconds_per_token
from skipstone.benchmark.subject import Subject, new_policy
from skipstone.bundle import open_bundle
from skipstone.exporters.pipeline import export_checkpoint
from skipstone.inputs import ModelInput, encode_input
from skipstone.runtimes.engines import EngineOptions
from skipstone.runtimes.generate import GenerationLimits
from skipstone.runtimes.sampling import SamplingConfig
from skipstone.runtimes.strategies import StrategyOptions

ROOT = Path(__file__).resolve().parent.parent.parent
OURS = ("plain", "layerskip", "prompt-lookup", "staged", "auto")


@dataclass(frozen=True)
class Settings:
    """The command line of a comparison."""

    checkpoint: Path
    texts: Texts
    max_new_tokens: int
    repeats: int
    threads: int
    quantize: str
    output: Path


def parse_settings(
    description: str, name: str, quantize: str, *, model: str = "coder", prompts: str = "code.jsonl"
) -> Settings:
    """Read the command line; `name` is the record's file name under docs/benchmarks."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "samples" / "models" / model)
    parser.add_argument("--prompts", type=Path, default=ROOT / "samples" / "prompts" / prompts)
    parser.add_argument("--limit", type=int, default=8, help="prompts to use")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quantize", default=quantize)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks" / name)
    chosen = parser.parse_args()
    texts = read_prompts(chosen.prompts)
    return Settings(
        checkpoint=chosen.checkpoint,
        texts=Texts(texts.prompts[: chosen.limit], texts.sources[: chosen.limit]),
        max_new_tokens=chosen.max_new_tokens,
        repeats=chosen.repeats,
        threads=chosen.threads,
        quantize=chosen.quantize,
        output=chosen.output,
    )


def command_line() -> list[str]:
    """How the running comparison was started."""
    return ["python", "-m", f"tests.peers.{Path(sys.argv[0]).stem}", *sys.argv[1:]]


def export(settings: Settings, folder: Path) -> Path:
    """The bundle to compare with."""
    export_checkpoint(settings.checkpoint, folder / "bundle", quantize=settings.quantize)
    return folder / "bundle"


def compare(
    settings: Settings,
    bundle: Path,
    peers: dict[str, Callable[[], Runner]],
    own_plain: dict[str, str],
    about: dict[str, str],
    ours: Sequence[str] = OURS,
) -> None:
    """Run our strategies and the peers' in turns, print a table and write the record.

    Args:
        settings: from the command line.
        bundle: ours.
        peers: makes a runner, by the name of its row.
        own_plain: for every peer's row the row of that system's plain decoding.
        about: versions and settings worth recording.
        ours: our strategies, `plain` first.
    """
    with Subject(open_bundle(bundle), EngineOptions(threads=settings.threads)) as subject:
        prompts, limits = inputs_of(subject, settings), limits_of(subject, settings)

        def make_runner(name: str) -> Runner:
            if name in peers:
                return peers[name]()
            policy = new_policy(name, subject, None, StrategyOptions())
            return StrategyRunner((subject,), policy, limits, SamplingConfig())

        make_runner("plain")(prompts[0])
        found = take_turns(make_runner, (*ours, *peers), prompts, settings.repeats)
        by_name = {series.strategy: series for series in found}
        rows = [
            _record(series, by_name, own_plain.get(series.strategy, "plain"), subject.costs.plain)
            for series in found
        ]
    _show(rows)
    record = {
        "command": command_line(),
        "about": about,
        "machine": asdict(this_machine()),
        "threads": settings.threads,
        "quantization": settings.quantize,
        "prompts": len(prompts),
        "max_new_tokens": settings.max_new_tokens,
        "repeats": settings.repeats,
        "rows": rows,
    }
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(settings.output, record)


def take_turns(
    make: Callable[[str], Runner], names: Sequence[str], inputs: Sequence[ModelInput], repeats: int
) -> list[Series]:
    """`measure_interleaved` with its progress shown."""
    with Bar(console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task("")

        def told(progress: Progress) -> None:
            bar.update(task, description=progress.strategy, completed=progress.done, total=progress.total)
            bar.refresh()

        return measure_interleaved(make, names, inputs, repeats, told)


def inputs_of(subject: Subject, settings: Settings) -> list[ModelInput]:
    """The texts that the model takes: prompts, or an encoder-decoder's sources."""
    codec, facts = subject.codec, subject.bundle.manifest.model
    if facts.encoder is None:
        return [encode_input(codec, facts, text) for text in settings.texts.prompts]
    return [encode_input(codec, facts, source=text) for text in settings.texts.sources]


def limits_of(subject: Subject, settings: Settings) -> GenerationLimits:
    """Decoders run on past the end of the text, so that all generate as much; an encoder-decoder's output ends."""
    facts = subject.bundle.manifest.model
    return GenerationLimits(settings.max_new_tokens, () if facts.encoder is None else facts.eos_token_ids)


def _record(series: Series, by_name: dict[str, Series], own: str, plain_cost: float) -> dict[str, object]:
    row = make_row(series, by_name["plain"], None, plain_cost, None)
    own_row = make_row(series, by_name[own], None, plain_cost, None)
    return {
        "row": series.strategy,
        "tokens_per_second": row.tokens_per_second,
        "speedup_over_our_plain": row.speedup,
        "min_speedup_over_our_plain": row.min_speedup,
        "own_plain": own,
        "speedup_over_own_plain": own_row.speedup,
        "min_speedup_over_own_plain": own_row.min_speedup,
        "ttft_ms": row.ttft_ms,
        "ms_per_token": [None if s is None else 1e3 * s for s in seconds_per_token(series)],
        "same_output_as_own_plain": _same(series, by_name[own]),
        "same_output_as_our_plain": _same(series, by_name["plain"]),
    }


def _same(series: Series, other: Series) -> int | None:
    """Prompts with the same tokens; None where a system does not tell its tokens."""
    pairs: list[tuple[Sample, Sample]] = list(zip(series.samples[0], other.samples[0], strict=True))
    if any(_unknown(a.tokens) or _unknown(b.tokens) for a, b in pairs):
        return None
    return sum(first_difference(a.tokens, b.tokens) is None for a, b in pairs)


def _unknown(tokens: Sequence[int]) -> bool:
    return any(token < 0 for token in tokens)


def _show(rows: list[dict[str, object]]) -> None:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("row", no_wrap=True)
    for name in ("tok/s", "× ours", "× its own", "least", "same"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row["row"]),
            f"{row['tokens_per_second']:.1f}",
            f"{row['speedup_over_our_plain']:.2f}×",
            f"{row['speedup_over_own_plain']:.2f}×",
            f"{row['min_speedup_over_own_plain']:.2f}×",
            "—" if row["same_output_as_own_plain"] is None else str(row["same_output_as_own_plain"]),
        )
    Console().print(table)
