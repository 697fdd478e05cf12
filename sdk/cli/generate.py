"""`skipstone generate`: text after a prompt, streamed as it comes."""

from __future__ import annotations

import json as json_
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from skipstone.cli import _options as flags
from skipstone.errors import UsageError

if TYPE_CHECKING:
    from skipstone.model import GenerationResult, GenerationStats


def generate(
    bundle: flags.BundleFolder,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.", show_default=False)] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File with the text to continue; - is standard input.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    strategy: Annotated[
        str,
        typer.Option(
            help="auto, plain, layerskip, staged, prompt-lookup, katz, recycling or draft-model.",
        ),
    ] = "auto",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: flags.TopK = 0,
    top_p: flags.TopP = 1.0,
    min_p: flags.MinP = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Over 1 discourages tokens seen before.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the random draws.", show_default="random")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text to stop at; may be repeated.")] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after an end-of-text token.")
    ] = False,
    assistant_early_exit: flags.AssistantEarlyExit = None,
    num_assistant_tokens: flags.NumAssistantTokens = None,
    assistant_confidence_threshold: flags.AssistantConfidenceThreshold = None,
    prompt_lookup_num_tokens: flags.PromptLookupNumTokens = None,
    assistant_model: Annotated[
        Path | None, typer.Option(help="Bundle of a draft model, for --strategy draft-model.")
    ] = None,
    context_length: flags.ContextLength = None,
    threads: flags.Threads = None,
    kv_type: flags.KvType = None,
    gpu_layers: Annotated[int, typer.Option(min=-1, help="Layers to place on a GPU; -1: all.")] = 0,
    show_drafts: Annotated[
        bool, typer.Option("--show-drafts", help="Colour accepted and refused drafts.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Generate text after a prompt.

    With --show-drafts accepted drafts are green, refused ones struck through in red, and the target's own
    tokens plain; without colours they stand in {+…+} and [-…-].
    """
    from skipstone.cli._common import check_strategy
    from skipstone.cli._drafts import DraftView, plain_view
    from skipstone.model import load_model
    from skipstone.runtimes.generate import GenerationLimits
    from skipstone.runtimes.sampling import SamplingConfig
    from skipstone.runtimes.strategies import StrategyOptions

    # Everything that can be said without the weights is said before they are loaded.
    text = read_prompt(prompt, prompt_file)
    GenerationLimits(max_new_tokens)
    sampling = SamplingConfig(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    options = StrategyOptions(
        assistant_early_exit, num_assistant_tokens, assistant_confidence_threshold, prompt_lookup_num_tokens
    )
    check_strategy(strategy)
    if json and show_drafts:
        raise UsageError("--json and --show-drafts do not go together", hint="leave one of them out")
    with load_model(
        bundle, context_length=context_length, threads=threads, kv_type=kv_type, gpu_layers=gpu_layers
    ) as model:
        pieces = model.stream(
            text,
            max_new_tokens=max_new_tokens,
            strategy=strategy,
            sampling=sampling,
            stop=tuple(stop or ()),
            options=options,
            assistant_model=None if assistant_model is None else str(assistant_model),
            ignore_eos=ignore_eos,
        )
        view = DraftView(model.codec.stream()) if show_drafts else plain_view(quiet=json)
        for chunk in pieces:
            view.show(chunk)
        result = model.last_result
    if result is None:
        raise AssertionError("a finished stream leaves its result")
    if json:
        typer.echo(json_.dumps(_record(result), ensure_ascii=False))
    else:
        view.end()
        print(_summary(result), file=sys.stderr)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt's text, from one of two flags.

    Raises:
        UsageError: both or neither given, a file that cannot be read as text, or an empty prompt.
    """
    if (prompt is None) == (file is None):
        raise UsageError("exactly one of --prompt and --prompt-file is needed", hint="say --prompt 'def f('")
    if file is None:
        text, source = prompt or "", "--prompt"
    else:
        source = f"--prompt-file {file}"
        try:
            text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{source}: cannot be read as UTF-8 text: {error}") from error
    if not text:
        raise UsageError(f"{source}: the prompt is empty", hint="pass some text to continue")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that were no UTF-8
        raise UsageError(f"{source}: not UTF-8 text", hint="pass the prompt in UTF-8") from error
    return text


def _record(result: GenerationResult) -> dict[str, object]:
    stats = result.stats
    figures = {
        "tokens_per_second": stats.tokens_per_second,
        "tokens_per_round": stats.tokens_per_round,
        "acceptance_rate": stats.acceptance_rate,
    }
    return {
        "text": result.text,
        "tokens": list(result.tokens),
        "stop_reason": result.stop_reason,
        "stats": asdict(stats) | figures,
    }


def _summary(result: GenerationResult) -> str:
    """One line of figures."""
    stats: GenerationStats = result.stats
    parts = [
        f"{stats.new_tokens} tokens ({result.stop_reason})",
        f"{stats.tokens_per_second:.1f} tokens/s",
        f"first after {stats.time_to_first_token * 1e3:.0f} ms",
    ]
    if stats.drafted:
        parts += [
            f"{stats.tokens_per_round:.2f} tokens per round",
            f"{stats.accepted} of {stats.drafted} drafts accepted",
        ]
    return f"[{stats.strategy}: {', '.join(parts)}]"
