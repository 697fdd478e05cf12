"""`skipstone bench`: plain decoding and every strategy on the same prompts, in one process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from skipstone.cli import _options as flags
from skipstone.errors import UsageError

if TYPE_CHECKING:
    from skipstone.benchmark.measure import Progress
    from skipstone.runtimes.engines import EngineOptions
    from skipstone.runtimes.engines.executorch.profile import Profile


def bench(
    bundle: flags.BundleFolder,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='JSONL file with {"prompt": …} lines, or {"source": …} for encoder-decoders.',
            show_default="a few built in",
        ),
    ] = None,
    strategies: Annotated[
        str | None,
        typer.Option(help="Names, separated by commas.", show_default="all that the bundle can run"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens per prompt.")] = 64,
    json: Annotated[Path | None, typer.Option(help="Write the report to this file.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Passes over the prompts.")] = 3,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use the first so many prompts.", show_default="all")
    ] = None,
    threads: flags.Threads = None,
    context_length: flags.ContextLength = None,
    kv_type: flags.KvType = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy, and compares the outputs.")] = 0.0,
    top_k: flags.TopK = 0,
    top_p: flags.TopP = 1.0,
    min_p: flags.MinP = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the random draws.")] = 0,
    stop_at_eos: Annotated[
        bool,
        typer.Option("--stop-at-eos", help="End a prompt at an end-of-text token, as encoder-decoders do."),
    ] = False,
    assistant_early_exit: flags.AssistantEarlyExit = None,
    assistant_later_exit: flags.AssistantLaterExit = None,
    num_assistant_tokens: flags.NumAssistantTokens = None,
    draft_tree: flags.DraftTree = None,
    assistant_confidence_threshold: flags.AssistantConfidenceThreshold = None,
    prompt_lookup_num_tokens: flags.PromptLookupNumTokens = None,
    assistant_model: Annotated[
        Path | None, typer.Option(help="Bundle of a draft model; adds strategy draft-model.")
    ] = None,
    control: Annotated[
        bool,
        typer.Option("--control", help="Run plain decoding twice, to see how far the machine's noise goes."),
    ] = False,
    baselines: Annotated[
        bool,
        typer.Option("--baselines", help="Also run llama_decode and create_completion, on --whole-gguf."),
    ] = False,
    whole_gguf: Annotated[Path | None, typer.Option(help="The uncut model, for --baselines.")] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Record the first pass round by round in this file, for skipstone simulate."),
    ] = None,
    place: flags.Place = None,
    follow_costs: Annotated[
        bool,
        typer.Option(
            "--follow-costs", help="Sample the costs between the prompts too, for skipstone simulate."
        ),
    ] = False,
    curve: flags.Curve = None,
    curve_only: Annotated[
        bool,
        typer.Option("--curve-only", help="Only measure the cost curve and keep it; --json writes it."),
    ] = False,
    no_memory: Annotated[bool, typer.Option("--no-memory", help="Do not measure peak memory.")] = False,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Also say where each method's time goes, operator by operator."),
    ] = False,
) -> None:
    """Compare every strategy with plain decoding: speed, acceptance, memory, same output or not."""
    from rich.console import Console

    from skipstone.benchmark.profile_tables import show_profile
    from skipstone.benchmark.prompts import Texts, read_prompts
    from skipstone.benchmark.render import show
    from skipstone.benchmark.report import check_writable, write_json
    from skipstone.benchmark.run import BenchOptions, run_bench
    from skipstone.builtin_texts import PROMPTS, SOURCES
    from skipstone.cli._progress import progress_bar
    from skipstone.placing import parse_place
    from skipstone.runtimes.engines import EngineOptions
    from skipstone.runtimes.sampling import SamplingConfig
    from skipstone.runtimes.shapes import TreeShape
    from skipstone.runtimes.strategies import StrategyOptions

    placed = parse_place(place or ())
    if curve_only and placed:
        raise UsageError("--curve-only: measures one bundle", hint="leave --place out")
    if curve_only:
        _measure_curve(bundle, EngineOptions(threads, kv_type), json, curve)
        return
    texts = Texts(PROMPTS, SOURCES) if prompts is None else read_prompts(prompts)
    options = BenchOptions(
        strategies=() if strategies is None else parse_strategies(strategies),
        prompts=texts.prompts[:limit],
        sources=texts.sources[:limit],
        prompts_source="built in" if prompts is None else prompts.name,
        max_new_tokens=max_new_tokens,
        repeats=repeats,
        threads=threads,
        context_length=context_length,
        kv_type=kv_type,
        ignore_eos=not stop_at_eos,
        sampling=SamplingConfig(temperature, top_k, top_p, min_p, seed=seed),
        strategy_options=StrategyOptions(
            assistant_early_exit,
            num_assistant_tokens,
            assistant_confidence_threshold,
            prompt_lookup_num_tokens,
            assistant_later_exit=assistant_later_exit,
            draft_tree=None if draft_tree is None else TreeShape.parse(draft_tree),
        ),
        assistant_model=None if assistant_model is None else str(assistant_model),
        control=control,
        baselines=baselines,
        whole_gguf=whole_gguf,
        memory=not no_memory,
        curve=curve,
        follow_costs=follow_costs,
        trace=trace,
        place=placed,
        command=("skipstone", *sys.argv[1:]),
    )
    for file, flag in ((json, "--json"), (trace, "--trace")):
        if file is not None:
            check_writable(file, flag)
    profiler = _profiler(bundle) if profile else None
    with progress_bar("measuring costs") as show_progress:

        def report_progress(at: Progress) -> None:
            show_progress(at.strategy, at.done, at.total)

        report = run_bench(bundle, options, report_progress)
        measured = None if profiler is None else profiler(options.engine, report_progress)
    if json is not None:
        write_json(json, report.as_json() | ({} if measured is None else {"profile": asdict(measured)}))
    show(report, Console())
    if measured is not None:
        show_profile(measured, Console())


def _measure_curve(folder: Path, options: EngineOptions, output: Path | None, given: Path | None) -> None:
    """Measure a bundle's cost curve, keep it, and write it to `output` too.

    Raises:
        UsageError: a curve was given as well, or the file cannot be written.
        BundleError, EngineError: the bundle cannot be opened.
    """
    from rich.console import Console

    from skipstone.benchmark.curve import measure_curve
    from skipstone.benchmark.render import show_costs
    from skipstone.benchmark.report import check_writable, write_json

    if given is not None:
        raise UsageError("--curve-only measures a curve, --curve takes one", hint="leave one of them out")
    if output is not None:
        check_writable(output)
    report = measure_curve(folder, options)
    if output is not None:
        write_json(output, report.measured.model_dump(mode="json"))
    console = Console()
    console.print(show_costs(report.measured.curve))
    kept = "kept nowhere: no folder takes it" if report.kept_in is None else f"kept in {report.kept_in}"
    console.print(kept, highlight=False, soft_wrap=True, markup=False)


def parse_strategies(text: str) -> tuple[str, ...]:
    """`a,b` → (a, b).

    Raises:
        UsageError: an unknown or missing name.
    """
    from skipstone.cli._common import check_strategy

    names = tuple(name for part in text.split(",") if (name := part.strip()))
    if not names:
        raise UsageError(f"--strategies {text!r}: no names in it", hint="say --strategies plain,staged,auto")
    for name in names:
        check_strategy(name, "--strategies")
    return names


def _profiler(
    folder: Path,
) -> Callable[[EngineOptions, Callable[[Progress], None]], Profile]:
    """What profiles this bundle.

    Raises:
        BundleError: there is no bundle.
        UsageError: nothing profiles its format.
    """
    from skipstone.benchmark.measure import Progress
    from skipstone.bundle import open_bundle, read_manifest
    from skipstone.runtimes.engines.reports import PROFILERS, choose

    measure = choose(PROFILERS, read_manifest(folder).format, "--profile")

    def run(options: EngineOptions, report: Callable[[Progress], None]) -> Profile:
        return measure(
            open_bundle(folder, verify_hashes=False),
            options,
            lambda at: report(Progress(at.done, at.total, f"profile {at.method}")),
        )

    return run
