"""Peak memory and tokens per second of a bundle, on this machine, by the benchmark's own means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from skipstone.benchmark.memory import MemoryRequest, peak_rss_mb
from skipstone.benchmark.run import PLAIN, BenchOptions, run_bench
from skipstone.builtin_texts import PROMPTS, SOURCES
from skipstone.evaluation.report import Speed
from skipstone.runtimes.cores import num_cores

if TYPE_CHECKING:
    from skipstone.evaluation.subjects import Subject
    from skipstone.exporters.probe import Probe

_PROMPT, _NEW = 64, 32  # tokens, of the process whose memory is taken


@dataclass(frozen=True)
class SpeedOptions:
    """How speeds are measured.

    Attributes:
        strategy: that takes turns with plain decoding.
        prompts, sources: texts for decoders, for encoder-decoders.
        max_new_tokens: per text.
        repeats: passes over the texts.
    """

    strategy: str = "auto"
    prompts: tuple[str, ...] = PROMPTS
    sources: tuple[str, ...] = SOURCES
    max_new_tokens: int = 64
    repeats: int = 3


def measure_speed(
    subject: Subject, options: SpeedOptions, threads: int | None, kv_type: str | None = None
) -> Speed:
    """Plain decoding and a strategy in turns, see `skipstone.benchmark`.

    Raises:
        UsageError, ContextFullError: texts or a strategy that the bundle cannot run.
    """
    bench = BenchOptions(
        strategies=(options.strategy,),
        prompts=options.prompts,
        sources=options.sources,
        max_new_tokens=options.max_new_tokens,
        repeats=options.repeats,
        threads=threads,
        kv_type=kv_type,
        memory=False,
    )
    report = run_bench(subject.path, bench)
    plain = report.rows[0]
    other = next((row for row in report.rows if row.strategy == options.strategy), plain)
    return Speed(
        plain=plain.tokens_per_second,
        strategy=other.strategy,
        tokens_per_second=other.tokens_per_second,
        speedup=other.speedup,
        identical=other.identical,
        prompts=report.prompts,
    )


def measure_memory(subject: Subject, probe: Probe, threads: int | None, kv_type: str | None = None) -> float:
    """Peak resident memory, MB, of a process that reads the beginning of a held-out text and decodes 32 tokens plainly.

    Raises:
        EngineError: the process failed.
    """
    request = MemoryRequest(
        bundle=str(subject.path),
        strategy=PLAIN,
        prompt=probe.tokens[: 1 if probe.source else min(_PROMPT, subject.longest // 2)],
        source=probe.source,
        max_new_tokens=max(1, min(_NEW, subject.longest // 4)),
        threads=num_cores() if threads is None else threads,
        context_length=subject.longest,
        kv_type=kv_type,
    )
    return peak_rss_mb(request)
