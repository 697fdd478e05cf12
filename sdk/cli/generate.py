"""`skipstone generate`: text after a prompt or from a source, streamed as it comes."""

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
    from skipstone.beams import BeamResult
    from skipstone.model import GenerationResult, GenerationStats
    from skipstone.runtimes.beam import BeamOptions
    from skipstone.runtimes.sampling import SamplingConfig


def generate(
    bundle: flags.BundleFolder,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.", show_default=False)] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File with the text to continue; - is standard input.")
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="Text for an encoder-decoder to read.", show_default=False)
    ] = None,
    source_file: Annotated[
        Path | None, typer.Option(help="File with the text to read; - is standard input.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    strategy: Annotated[
        str,
        typer.Option(
            help="auto, plain, aggressive, layerskip, staged, text, prompt-lookup, katz, recycling or draft-model.",
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
    assistant_later_exit: flags.AssistantLaterExit = None,
    num_assistant_tokens: flags.NumAssistantTokens = None,
    draft_tree: flags.DraftTree = None,
    assistant_confidence_threshold: flags.AssistantConfidenceThreshold = None,
    prompt_lookup_num_tokens: flags.PromptLookupNumTokens = None,
    early_exit_margin: Annotated[
        str | None,
        typer.Option(
            help="Lossy: leave the decoder early where an exit is surer than this; or 'calibrated'.",
            show_default="never",
        ),
    ] = None,
    encoder_saturation: Annotated[
        str | None,
        typer.Option(
            help="Lossy: stop the encoder where its states turn no more than this cosine; or 'calibrated'.",
            show_default="never",
        ),
    ] = None,
    num_beams: Annotated[
        int, typer.Option(help="Search the likeliest text with so many beams; 1: generate.")
    ] = 1,
    num_return_sequences: Annotated[int, typer.Option(help="Of beam search: texts to show.")] = 1,
    length_penalty: Annotated[float, typer.Option(help="Of beam search: over 0 favours long texts.")] = 1.0,
    patience: Annotated[
        float | None,
        typer.Option(
            help="Of beam search: stop once so many times --num-beams texts have ended.",
            show_default="once none can be bettered",
        ),
    ] = None,
    num_beam_groups: Annotated[int, typer.Option(help="Of diverse beam search: groups of beams.")] = 1,
    diversity_penalty: Annotated[
        float, typer.Option(help="Of diverse beam search: for tokens that other groups took.")
    ] = 0.0,
    guide: Annotated[
        str | None, typer.Option(help="Text that the output may resemble, to draft from: a template, say.")
    ] = None,
    assistant_model: Annotated[
        Path | None, typer.Option(help="Bundle of a draft model, for --strategy draft-model.")
    ] = None,
    context_length: flags.ContextLength = None,
    threads: flags.Threads = None,
    kv_type: flags.KvType = None,
    gpu_layers: Annotated[
        int, typer.Option(min=-1, help="Layers to place on a GPU, from the last one on; -1: all.")
    ] = 0,
    place: flags.Place = None,
    curve: flags.Curve = None,
    show_drafts: Annotated[
        bool, typer.Option("--show-drafts", help="Colour accepted and refused drafts.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Generate text after a prompt, or what an encoder-decoder makes of a source.

    With --show-drafts accepted drafts are green, refused ones struck through in red, and the target's own
    tokens plain; without colours they stand in {+…+} and [-…-].
    """
    from skipstone.beams import search_beams
    from skipstone.cli._common import check_strategy
    from skipstone.cli._drafts import DraftView, plain_view
    from skipstone.cli._thresholds import early_stopping, look_up
    from skipstone.model import load_model
    from skipstone.placing import parse_place
    from skipstone.runtimes.beam import BeamOptions
    from skipstone.runtimes.generate import GenerationLimits
    from skipstone.runtimes.sampling import SamplingConfig
    from skipstone.runtimes.shapes import TreeShape
    from skipstone.runtimes.strategies import StrategyOptions

    # Everything that can be said without the weights is said before they are loaded.
    begins, reads = read_text("prompt", prompt, prompt_file), read_text("source", source, source_file)
    if begins is None and reads is None:
        raise UsageError(
            "one of --prompt and --prompt-file is needed, or for an encoder-decoder --source or --source-file",
            hint="say --prompt 'def f('",
        )
    GenerationLimits(max_new_tokens)
    sampling = SamplingConfig(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    options = StrategyOptions(
        assistant_early_exit,
        num_assistant_tokens,
        assistant_confidence_threshold,
        prompt_lookup_num_tokens,
        guide,
        assistant_later_exit,
        None if draft_tree is None else TreeShape.parse(draft_tree),
    )
    beams = BeamOptions(
        num_beams, num_return_sequences, length_penalty, patience, num_beam_groups, diversity_penalty
    )
    placed = parse_place(place or ())
    stopping = early_stopping(early_exit_margin, encoder_saturation)
    check_strategy(strategy)
    _check_beams(
        beams,
        sampling,
        show_drafts=show_drafts,
        lossy=early_exit_margin is not None or encoder_saturation is not None,
    )
    if json and show_drafts:
        raise UsageError("--json and --show-drafts do not go together", hint="leave one of them out")
    adaptive = look_up(stopping, bundle)
    with load_model(
        bundle,
        context_length=context_length,
        threads=threads,
        kv_type=kv_type,
        gpu_layers=gpu_layers,
        curve=curve,
        place=placed,
    ) as model:
        if num_beams > 1:
            found = search_beams(
                model,
                begins,
                source=reads,
                options=beams,
                max_new_tokens=max_new_tokens,
                ignore_eos=ignore_eos,
            )
            _show_beams(found, json=json)
            return
        pieces = model.stream(
            begins,
            source=reads,
            max_new_tokens=max_new_tokens,
            strategy=strategy,
            sampling=sampling,
            stop=tuple(stop or ()),
            options=options,
            assistant_model=None if assistant_model is None else str(assistant_model),
            ignore_eos=ignore_eos,
            adaptive=adaptive,
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


def _check_beams(beams: BeamOptions, sampling: SamplingConfig, *, show_drafts: bool, lossy: bool) -> None:
    """Refuse what does not go with beam search.

    Raises:
        UsageError: naming the flag.
    """
    if beams.num_beams > 1 and (not sampling.greedy or sampling.repetition_penalty != 1.0 or show_drafts):
        raise UsageError(
            "--num-beams: beam search neither samples, nor penalises repetition, nor drafts",
            hint="leave --temperature, --repetition-penalty and --show-drafts out",
        )
    if beams.num_beams > 1 and lossy:
        raise UsageError(
            "--num-beams: beam search does not stop early",
            hint="leave --early-exit-margin and --encoder-saturation out",
        )


def _show_beams(found: BeamResult, *, json: bool) -> None:
    if json:
        best = found.texts[0]
        record = {"text": best.text, "tokens": list(best.tokens)} | asdict(found)
        typer.echo(json_.dumps(record, ensure_ascii=False))
        return
    for text in found.texts:
        typer.echo(text.text)
    scores = ", ".join(f"{text.score:.3f}" for text in found.texts)
    print(f"[beam search: scores {scores}, {found.seconds:.2f} s]", file=sys.stderr)


def read_text(name: str, text: str | None, file: Path | None) -> str | None:
    """The text of one of two flags, --NAME and --NAME-file; None if neither was given.

    Raises:
        UsageError: both given, a file that cannot be read as text, or an empty text.
    """
    if text is not None and file is not None:
        raise UsageError(f"exactly one of --{name} and --{name}-file is needed, both were given")
    flag = f"--{name}"
    if file is not None:
        flag = f"--{name}-file {file}"
        try:
            text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{flag}: cannot be read as UTF-8 text: {error}") from error
    if text is None:
        return None
    if not text:
        raise UsageError(f"{flag}: the {name} is empty", hint="pass some text")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that were no UTF-8
        raise UsageError(f"{flag}: not UTF-8 text", hint=f"pass the {name} in UTF-8") from error
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
    """One line of figures, and one for every stretch of segments where they ran on several engines."""
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
    if stats.lossy:
        parts.append("lossy" if stats.guarantee is None else f"lossy: {stats.guarantee}")
    line = f"[{stats.strategy}: {', '.join(parts)}]"
    return "\n".join([line, *(f"[{where}]" for where in stats.placement)])
