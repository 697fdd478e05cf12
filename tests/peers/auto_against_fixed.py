"""Compare `auto` with the best of all fixed ways to decode, found by trying them all on the same mixed texts.

    python -m tests.peers.auto_against_fixed                        the shipped model on llama.cpp and on ExecuTorch
    python -m tests.peers.auto_against_fixed --bundles q8_0/        bundles that are there already
    python -m tests.peers.auto_against_fixed --ways auto text --repeats 25    few ways, so often that noise averages out

Fixed ways are every strategy with every exit and a few draft lengths. All take turns, text by text, plain decoding
twice: what the second falls short of the first by on a text is noise. The best is the fastest on the whole set, seen
afterwards, which nobody can know before. `auto` begins every pass with what it finds out when a bundle is first used,
from a few built-in texts; `auto, new` begins with nothing.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from skipstone.benchmark.measure import Runner, Sample, Series, StrategyRunner
from skipstone.benchmark.report import this_machine, write_json
from skipstone.benchmark.rows import make_row
from skipstone.benchmark.subject import Subject, new_policy
from skipstone.bundle import Bundle, open_bundle
from skipstone.exporters.pipeline import export_checkpoint
from skipstone.inputs import ModelInput, encode_input
from skipstone.jsonl import read_objects
from skipstone.runtimes.engines import EngineOptions
from skipstone.runtimes.generate import GenerationLimits, Policy
from skipstone.runtimes.sampling import SamplingConfig
from skipstone.runtimes.strategies import StrategyOptions
from tests.peers.common import ROOT, command_line, take_turns

SCHEMES = (("gguf", "q8_0"), ("executorch", "none"))
TEXT = ("text", "prompt-lookup", "katz", "recycling")
LENGTHS = (None, 3, 6)
PLAIN, AGAIN, AUTO, NEW = "plain", "plain again", "auto", "auto, new"
_OPEN = StrategyOptions()


@dataclass(frozen=True)
class Way:
    """A strategy with what is fixed of it."""

    strategy: str
    options: StrategyOptions = _OPEN


def ways_of(bundle: Bundle) -> dict[str, Way]:
    """By name, all that are compared."""
    return {PLAIN: Way(PLAIN), AGAIN: Way(PLAIN), AUTO: Way(AUTO), NEW: Way(AUTO), **dict(_fixed(bundle))}


def _fixed(bundle: Bundle) -> Iterator[tuple[str, Way]]:
    yield from ((name, Way(name)) for name in TEXT)
    for strategy in ("layerskip", "staged"):
        for exit_layer in bundle.manifest.exits:
            for length in LENGTHS:
                name = f"{strategy}, exit {exit_layer}" + ("" if length is None else f", {length} drafts")
                yield name, Way(strategy, StrategyOptions(exit_layer, length))


@dataclass(frozen=True)
class Texts:
    """Prompts, and how many tokens to make after each."""

    inputs: tuple[ModelInput, ...]
    counts: tuple[int, ...]

    @classmethod
    def read(cls, file: Path, subject: Subject, count: int) -> Self:
        """From a file of prompts; a line may say `max_new_tokens` of its own."""
        facts = subject.bundle.manifest.model
        lines = [line for _, line in read_objects(file, 'a line is {"prompt": "def f("}')]
        inputs = tuple(encode_input(subject.codec, facts, str(line["prompt"])) for line in lines)
        return cls(inputs, tuple(int(line.get("max_new_tokens", count)) for line in lines))

    def runner(self, subject: Subject, policy: Policy) -> Runner:
        """Generates after one of them."""
        by_prompt = {
            tuple(given.prompt): count for given, count in zip(self.inputs, self.counts, strict=True)
        }

        def run(given: ModelInput) -> Sample:
            limits = GenerationLimits(by_prompt[tuple(given.prompt)])
            return StrategyRunner((subject,), policy, limits, SamplingConfig())(given)

        return run


def run(bundle: Bundle, arguments: argparse.Namespace) -> dict[str, object]:
    """All ways on one bundle; the record of it."""
    ways = ways_of(bundle)
    if unknown := set(arguments.ways or ()) - set(ways):
        raise SystemExit(f"--ways: not known: {', '.join(unknown)}; one of: {', '.join(ways)}")
    if arguments.ways is not None:
        ways = {name: ways[name] for name in (PLAIN, AGAIN, *arguments.ways)}
    with Subject(bundle, EngineOptions(threads=arguments.threads)) as subject:
        texts = Texts.read(arguments.prompts, subject, arguments.max_new_tokens)

        def make(name: str) -> Runner:
            record = {} if name == NEW else None
            policy = new_policy(ways[name].strategy, subject, None, ways[name].options, record=record)
            return texts.runner(subject, policy)

        found = take_turns(make, tuple(ways), texts.inputs, arguments.repeats)
    rows = rows_of(found, subject.costs.plain)
    fixed = [row for row in rows if row["way"] not in (AUTO, NEW, AGAIN)]
    best = max(fixed, key=lambda row: row["speedup"])
    show(bundle, rows, str(best["way"]))
    return {
        "format": bundle.manifest.format,
        "quantization": bundle.manifest.quantization.scheme,
        "best_fixed": best["way"],
        "over_best_fixed": {
            row["way"]: row["speedup"] / best["speedup"] for row in rows if row["way"] in (AUTO, NEW)
        },
        "first_record": {name: asdict(record) for name, record in subject.first_record().items()},
        "rows": rows,
    }


def rows_of(found: Sequence[Series], plain_cost: float) -> list[dict[str, object]]:
    """One for each way; speed-ups over plain decoding, on the whole set and text by text, beside the bound that the
    cost curve sets.
    """
    plain = next(series for series in found if series.strategy == PLAIN)
    rows = []
    for series in found:
        row = make_row(series, plain, None, plain_cost, None)
        rows.append(
            {
                "way": series.strategy,
                "tokens_per_second": row.tokens_per_second,
                "speedup": row.speedup,
                "bound": row.bound,
                "min_speedup": row.min_speedup,
                "prompt_speedups": row.prompt_speedups,
                "tokens_per_round": row.tokens_per_round,
            }
        )
    return rows


def show(bundle: Bundle, rows: Sequence[dict[str, object]], best: str) -> None:
    """The fastest rows and those that must be there."""
    ranked = sorted(rows, key=lambda row: -float(str(row["speedup"])))
    title = f"{bundle.manifest.format} {bundle.manifest.quantization.scheme}, best fixed: {best}"
    table = Table(box=SIMPLE_HEAD, title=title)
    for name in ("way", "tok/s", "speed-up", "least", "tokens/round"):
        table.add_column(name, justify="left" if name == "way" else "right", no_wrap=True)
    for place, row in enumerate(ranked):
        if place < 6 or row["way"] in (PLAIN, AGAIN, AUTO, NEW):
            figures = ("tokens_per_second", "speedup", "min_speedup", "tokens_per_round")
            table.add_row(str(row["way"]), *(f"{row[figure]:.2f}" for figure in figures))
    Console(width=100).print(table)


def bundles_of(arguments: argparse.Namespace, folder: Path) -> Iterator[Bundle]:
    """Those named, or the shipped model in `SCHEMES`."""
    for path in arguments.bundles or ():
        yield open_bundle(path)
    if not arguments.bundles:
        for format, quantize in SCHEMES:
            yield export_checkpoint(
                ROOT / "samples" / "models" / "coder",
                folder / f"{format}-{quantize}",
                format=format,
                quantize=quantize,
                context_length=512 if format == "executorch" else None,
            )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--bundles", type=Path, nargs="+", help="default: the shipped model on both engines")
    parser.add_argument("--prompts", type=Path, default=ROOT / "samples" / "prompts" / "mixed.jsonl")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="where a line does not say")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="+", help="besides plain decoding; default: all")
    parser.add_argument("--threads", type=int, help="default: as the engine chooses")
    default = ROOT / "docs" / "benchmarks" / "auto-against-fixed.json"
    parser.add_argument("--output", type=Path, default=default)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = [run(bundle, arguments) for bundle in bundles_of(arguments, Path(folder))]
    record = {
        "command": command_line(),
        "machine": asdict(this_machine()),
        "threads": arguments.threads,
        "kinds": [line.get("kind", "") for _, line in read_objects(arguments.prompts, "a prompt a line")],
        "max_new_tokens": arguments.max_new_tokens,
        "repeats": arguments.repeats,
        "bundles": found,
    }
    write_json(arguments.output, record)


if __name__ == "__main__":
    main()
