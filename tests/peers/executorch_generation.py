"""Compare plain decoding on ExecuTorch with optimum-executorch's own generation loop on the same weights.

    python -m tests.peers.executorch_generation                      f32
    python -m tests.peers.executorch_generation --quantize 8da4w --output 8da4w.json

optimum-executorch pins another transformers than ours, so it gets an environment of its own, made on the
first run (build/peers/optimum-executorch). Its export is the one its README recommends: XNNPACK, custom SDPA,
custom K/V cache. Every row runs in a process of its own, in turns, greedy, end-of-text tokens ignored.

ExecuTorch's attention calls a BLAS that opens OpenMP teams under ExecuTorch's own threads, so theirs runs a
second time with OMP_NUM_THREADS=1, which is faster wherever cores are few.
"""

import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from skipstone.benchmark.lossless import first_difference
from skipstone.benchmark.measure import Runner, Series
from skipstone.benchmark.report import this_machine, write_json
from skipstone.benchmark.rows import make_row
from skipstone.exporters.pipeline import export_checkpoint
from skipstone.inputs import ModelInput
from tests.peers.common import Settings, command_line, our_worker, parse_settings, runner_of, take_turns
from tests.peers.environment import make_environment
from tests.peers.line_protocol import Worker

OURS, THEIRS, TUNED = "skipstone plain", "optimum-executorch", "optimum-executorch (OMP 1)"
PACKAGES = (("torch==2.13.0",), ("torch==2.13.0", "executorch==1.5.1", "optimum-executorch==1.1.0"))
CONTEXT = 512
SCHEMES = {"none": (), "8da4w": ("--qlinear", "8da4w", "--qembedding", "4w")}


def export_theirs(settings: Settings, programs: Path) -> Path:
    """Their .pte by their command line, kept beside the environment under a hash of the weights."""
    weights = b"".join(path.read_bytes() for path in sorted(settings.checkpoint.glob("*.safetensors")))
    digest = hashlib.sha256(weights).hexdigest()[:16]
    folder = programs.parent / "exported" / f"{digest}-{settings.quantize}-{CONTEXT}"
    if not (folder / "model.pte").is_file():
        print(f"exporting {settings.checkpoint.name} with {THEIRS} (minutes, once)", file=sys.stderr)
        draft = folder.with_suffix(".part")
        draft.mkdir(parents=True, exist_ok=True)
        flags = (
            "--task",
            "text-generation",
            "--recipe",
            "xnnpack",
            "--use_custom_sdpa",
            "--use_custom_kv_cache",
        )
        command = [programs / "optimum-cli", "export", "executorch", "--model", settings.checkpoint, *flags]
        size = ("--max_seq_len", str(CONTEXT), "--dtype", "float32", *SCHEMES[settings.quantize])
        done = subprocess.run(
            [*command, *size, "--output_dir", draft], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"{THEIRS} cannot export:\n{done.stderr[-2000:]}")
        draft.rename(folder)
    return folder


def export_ours(settings: Settings, folder: Path) -> Path:
    """Our bundle, cut at the exits recorded with the checkpoint."""
    print(f"exporting {settings.checkpoint.name} with skipstone", file=sys.stderr)
    export_checkpoint(
        settings.checkpoint,
        folder / "bundle",
        format="executorch",
        quantize=settings.quantize,
        context_length=CONTEXT,
    )
    return folder / "bundle"


def pte_bytes(folder: Path) -> int:
    """Size of the program."""
    return sum(path.stat().st_size for path in folder.glob("*.pte"))


def measure(
    settings: Settings, workers: dict[str, Worker], prompts: Sequence[ModelInput]
) -> dict[str, Series]:
    """Both systems in turns, after a run of each that is not counted."""

    def make(name: str) -> Runner:
        return runner_of(workers[name], "plain", settings.max_new_tokens)

    for name in workers:
        make(name)(prompts[0])
    return {series.strategy: series for series in take_turns(make, tuple(workers), prompts, settings.repeats)}


def rows_of(by_name: dict[str, Series]) -> list[dict[str, object]]:
    """The record's rows, each compared with their loop as it comes and with one OpenMP thread."""
    found = []
    for name, series in by_name.items():
        row = make_row(series, by_name[THEIRS], None, None, None)
        tuned = make_row(series, by_name[TUNED], None, None, None)
        pairs = zip(series.samples[0], by_name[THEIRS].samples[0], strict=True)
        same = sum(first_difference(a.tokens, b.tokens) is None for a, b in pairs)
        found.append(
            {
                "row": name,
                "tokens_per_second": row.tokens_per_second,
                "speedup_over_theirs": row.speedup,
                "min_speedup_over_theirs": row.min_speedup,
                "speedup_over_tuned": tuned.speedup,
                "min_speedup_over_tuned": tuned.min_speedup,
                "ttft_ms": row.ttft_ms,
                "same_output_as_theirs": same,
            }
        )
    return found


def show(rows: Sequence[dict[str, object]]) -> None:
    """The rows as a table."""
    table = Table(box=SIMPLE_HEAD)
    for name in ("row", "tok/s", "× theirs", "least", "× tuned", "ttft ms", "same"):
        table.add_column(name, justify="left" if name == "row" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row["row"]),
            f"{row['tokens_per_second']:.1f}",
            f"{row['speedup_over_theirs']:.2f}×",
            f"{row['min_speedup_over_theirs']:.2f}×",
            f"{row['speedup_over_tuned']:.2f}×",
            f"{row['ttft_ms']:.1f}",
            str(row["same_output_as_theirs"]),
        )
    Console(width=100).print(table)


def main() -> None:
    """Entry point."""
    settings = parse_settings("Compare with optimum-executorch.", "peers-optimum-executorch.json", "none")
    tokenizer = Tokenizer.from_file(str(settings.checkpoint / "tokenizer.json"))
    prompts = [
        ModelInput(tuple(tokenizer.encode(text, add_special_tokens=False).ids))
        for text in settings.texts.prompts
    ]
    programs = make_environment("optimum-executorch", PACKAGES)
    theirs = export_theirs(settings, programs)
    with tempfile.TemporaryDirectory() as folder:
        ours = export_ours(settings, Path(folder))
        peer = (programs / "python", "tests.peers.optimum_executorch_worker", theirs)
        with (
            our_worker(ours, settings) as own,
            Worker(*peer, str(settings.threads)) as plain,
            Worker(*peer, str(settings.threads), environment={"OMP_NUM_THREADS": "1"}) as tuned,
        ):
            workers = {OURS: own, THEIRS: plain, TUNED: tuned}
            rows = rows_of(measure(settings, workers, prompts))
        sizes = {OURS: pte_bytes(ours), THEIRS: pte_bytes(theirs)}
    show(rows)
    record = {
        "command": command_line(),
        "about": {name: worker.about for name, worker in workers.items()},
        "machine": asdict(this_machine()),
        "threads": settings.threads,
        "quantization": settings.quantize,
        "context_length": CONTEXT,
        "prompts": len(prompts),
        "max_new_tokens": settings.max_new_tokens,
        "repeats": settings.repeats,
        "pte_bytes": sizes,
        "rows": rows,
    }
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(settings.output, record)


if __name__ == "__main__":
    main()
