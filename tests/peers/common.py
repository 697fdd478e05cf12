"""What the comparisons with other systems share: the model, the prompts, turns, and the record."""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress as Bar
from rich.table import Table

from skipstone.benchmark.lossless import first_difference
from skipstone.benchmark.measure import Progress, Runner, Sample, Series, measure_interleaved
from skipstone.benchmark.prompts import Texts, read_prompts
from skipstone.benchmark.report import this_machine, write_json
from skipstone.benchmark.rows import make_row, seconds_per_token
from skipstone.bundle import open_bundle
from skipstone.exporters.pipeline import export_checkpoint
from skipstone.inputs import ModelInput, encode_input
from skipstone.runtimes.text import TextCodec
from tests.peers.line_protocol import Request, Worker

ROOT = Path(__file__).resolve().parent.parent.parent
OURS = ("plain", "layerskip", "prompt-lookup", "staged", "auto")
_SETTLE_SECONDS = 0.05  # thread teams of the process before may still wait spinning


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


def our_worker(bundle: Path, settings: Settings) -> Worker:
    """Our strategies on a bundle, in a process of their own."""
    return Worker(Path(sys.executable), "tests.peers.skipstone_worker", bundle, str(settings.threads))


def runner_of(
    worker: Worker,
    row: str,
    max_new_tokens: int | Callable[[ModelInput], int],
    *,
    settle: float = _SETTLE_SECONDS,
) -> Runner:
    """A row of a worker as what the benchmark runs; it has learned nothing yet."""
    fresh = True

    def run(given: ModelInput) -> Sample:
        nonlocal fresh
        count = max_new_tokens if isinstance(max_new_tokens, int) else max_new_tokens(given)
        request = Request(row, tuple(given.prompt), tuple(given.source), count, fresh)
        fresh = False
        time.sleep(settle)
        told = worker(request)
        rounds = told.rounds or max(1, len(told.tokens) - 1)
        return Sample(told.tokens, told.first_seconds, told.decode_seconds, rounds)

    return run


def inputs_of(bundle: Path, settings: Settings) -> list[ModelInput]:
    """The texts that a bundle's model takes: prompts, or an encoder-decoder's sources."""
    opened = open_bundle(bundle)
    facts = opened.manifest.model
    bos = facts.bos_token_id if facts.add_bos else None
    codec = TextCodec(opened.file(opened.manifest.tokenizer), facts.vocab_size, bos)
    if facts.encoder is None:
        return [encode_input(codec, facts, text) for text in settings.texts.prompts]
    return [encode_input(codec, facts, source=text) for text in settings.texts.sources]


def compare_with_transformers(settings: Settings, ours: Sequence[str] = OURS) -> None:
    """Ours and transformers' ways to generate, on the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = export(settings, Path(folder))
        exit_layer = open_bundle(bundle).manifest.exits[0]
        size = (str(settings.threads), str(exit_layer))
        module = "tests.peers.transformers_worker"
        with Worker(Path(sys.executable), module, settings.checkpoint, *size) as theirs:
            rows = {f"transformers {row}": row for row in ("plain", "prompt_lookup", "assistant")}
            compare(settings, bundle, theirs, rows, ours)


def compare(
    settings: Settings, bundle: Path, theirs: Worker, rows: Mapping[str, str], ours: Sequence[str] = OURS
) -> None:
    """Run our strategies and a peer's in turns, each in its process, print a table and write the record.

    Args:
        settings: from the command line.
        bundle: ours.
        theirs: the peer's process.
        rows: its rows by the names they are shown under, its plain decoding first.
        ours: our strategies, `plain` first.
    """
    with our_worker(bundle, settings) as own:

        def make_runner(name: str) -> Runner:
            worker, row = (theirs, rows[name]) if name in rows else (own, name)
            return runner_of(worker, row, settings.max_new_tokens)

        inputs = inputs_of(bundle, settings)
        for name in (ours[0], next(iter(rows))):
            make_runner(name)(inputs[0])
        found = take_turns(make_runner, (*ours, *rows), inputs, settings.repeats)
        about = {"ours": own.about, "theirs": theirs.about}
    by_name = {series.strategy: series for series in found}
    own_plain = dict.fromkeys(ours, ours[0]) | dict.fromkeys(rows, next(iter(rows)))
    table = [_record(series, by_name, own_plain[series.strategy]) for series in found]
    _show(table)
    record = {
        "command": command_line(),
        "about": about,
        "machine": asdict(this_machine()),
        "threads": settings.threads,
        "quantization": settings.quantize,
        "prompts": len(inputs),
        "max_new_tokens": settings.max_new_tokens,
        "repeats": settings.repeats,
        "rows": table,
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


def _record(series: Series, by_name: dict[str, Series], own: str) -> dict[str, object]:
    row = make_row(series, by_name["plain"], None, None, None)
    own_row = make_row(series, by_name[own], None, None, None)
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
