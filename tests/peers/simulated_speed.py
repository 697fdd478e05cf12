"""Compare what the simulator predicts with what benchmarks measure, on every engine of this machine.

    python -m tests.peers.simulated_speed                            the shipped model on both CPU engines
    python -m tests.peers.simulated_speed --bundles q8_0/ 8da4w/     bundles that are there already

Every bundle is run twice, in processes of their own: once to record a trace, once to be measured; both size their
drafts by one curve measured before. Predictions come from the trace, its host's time and the costs as they were all
along the second run; nothing of what they are compared with is in them. `own` rows predict a bundle from its own
trace, `across` rows from the first bundle's, as if the others' devices were not here: what was accepted there is taken
to be what would be accepted with another quantisation, and drafts to be as long as the first bundle's costs had them.
`auto` is not predicted across: it chooses anew on every device.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from skipstone.benchmark.prediction import Comparison, MeasuredDevice, compare, read_report
from skipstone.benchmark.report import this_machine, write_json
from skipstone.devices.simulator import measure_host
from skipstone.devices.traces import Trace, read_trace
from skipstone.exporters.pipeline import export_checkpoint
from tests.peers.common import ROOT, command_line

STRATEGIES = "plain,prompt-lookup,katz,layerskip,staged,auto"
SCHEMES = (("gguf", "q8_0"), ("gguf", "q4_0"), ("executorch", "none"), ("executorch", "8da4w"))
CONTEXT = 512
CLOSE = 0.10


@dataclass(frozen=True)
class Recorded:
    """A bundle's two runs: the trace of one, the report of the other."""

    trace: Trace
    report: MeasuredDevice


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--bundles", type=Path, nargs="+", help="default: the shipped model in four schemes")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "samples" / "models" / "coder")
    parser.add_argument("--prompts", type=Path, default=ROOT / "samples" / "prompts" / "code.jsonl")
    parser.add_argument("--strategies", default=STRATEGIES)
    parser.add_argument("--limit", type=int, default=12, help="prompts to use")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3, help="of what is measured; a trace is one pass")
    parser.add_argument("--threads", type=int, help="default: as the engine chooses")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks" / "simulated-speed.json")
    return parser.parse_args()


def export(checkpoint: Path, folder: Path) -> Iterator[Path]:
    """The checkpoint in every scheme."""
    for format, scheme in SCHEMES:
        output = folder / f"{checkpoint.name}-{format}-{scheme}"
        print(f"exporting {output.name}", file=sys.stderr)
        more = {} if format == "gguf" else {"context_length": CONTEXT}
        export_checkpoint(checkpoint, output, format=format, quantize=scheme, **more)
        yield output


def record(bundle: Path, folder: Path, chosen: argparse.Namespace) -> Recorded:
    """Measure a bundle's costs, then run it twice."""
    trace, report = folder / f"{bundle.name}.jsonl", folder / f"{bundle.name}.json"
    curve = folder / f"{bundle.name}.curve"
    bench(bundle, chosen, "--curve-only", "--json", str(curve))
    bench(bundle, chosen, "--curve", str(curve), "--repeats", "1", "--trace", str(trace))
    bench(bundle, chosen, "--curve", str(curve), "--repeats", str(chosen.repeats), "--json", str(report))
    return Recorded(read_trace(trace), read_report(report))


def bench(bundle: Path, chosen: argparse.Namespace, *more: str) -> None:
    """`skipstone bench` in a process of its own.

    Raises:
        RuntimeError: it failed.
    """
    print(f"{bundle.name}: bench {' '.join(more)}", file=sys.stderr)
    flags = {
        "--prompts": chosen.prompts,
        "--strategies": chosen.strategies,
        "--limit": chosen.limit,
        "--max-new-tokens": chosen.max_new_tokens,
        "--threads": chosen.threads,
        "--context-length": CONTEXT,
    }
    given = [str(part) for pair in flags.items() if pair[1] is not None for part in pair]
    command = [sys.executable, "-m", "skipstone", "bench", str(bundle), *given, "--no-memory"]
    command += ["--follow-costs", *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{bundle}: {done.stderr[-2000:]}")


def all_pairs(found: Sequence[Recorded]) -> tuple[list[Comparison], list[Comparison]]:
    """Every bundle from its own trace; every other one from the first one's."""
    own = [pair for each in found for pair in compare(each.trace, each.report, measure_host(each.trace))]
    first, *others = found
    host = measure_host(first.trace)
    across = [pair for each in others for pair in compare(first.trace, each.report, host)]
    return own, [pair for pair in across if pair.strategy != "auto"]


def close(pairs: Sequence[Comparison]) -> int:
    return sum(1 for pair in pairs if abs(pair.error) <= CLOSE)


def show(title: str, pairs: Sequence[Comparison]) -> None:
    table = Table(title=f"{title}: {close(pairs)} of {len(pairs)} within {CLOSE:.0%}", box=SIMPLE_HEAD)
    for name in ("bundle", "strategy", "predicted tok/s", "measured tok/s", "error"):
        table.add_column(name, justify="left" if name in ("bundle", "strategy") else "right")
    for pair in pairs:
        figures = f"{pair.predicted:.1f}", f"{pair.measured:.1f}", f"{pair.error:+.1%}"
        table.add_row(pair.device, pair.strategy, *figures)
    Console().print(table)


def main() -> None:
    chosen = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        bundles = chosen.bundles or export(chosen.checkpoint, Path(folder))
        found = [record(bundle.resolve(), Path(folder), chosen) for bundle in bundles]
    own, across = all_pairs(found)
    show("From its own trace", own)
    show(f"From the trace of {found[0].report.name}", across)
    rows = {
        name: [asdict(pair) | {"error": pair.error} for pair in pairs]
        for name, pairs in (("own", own), ("across", across))
    }
    record_of = {
        "command": command_line(),
        "machine": asdict(this_machine()),
        "prompts": [chosen.prompts.name, chosen.limit],
        "max_new_tokens": chosen.max_new_tokens,
        "repeats": chosen.repeats,
        "threads": chosen.threads,
        "stretch": {each.report.name: measure_host(each.trace).stretch for each in found},
    }
    write_json(chosen.output, record_of | rows)


if __name__ == "__main__":
    main()
