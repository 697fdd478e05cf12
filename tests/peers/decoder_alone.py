"""Compare an encoder-decoder with a decoder alone of as many parameters that does the same task by prompt.

    python -m tests.peers.decoder_alone

The claim measured is that of "Return of the Encoder" (arXiv 2501.16273, abstract): at equal size the first token comes
sooner, since the encoder's layers are run once over the source and only the decoder's for every token.

The decoder alone has the shape of `coder`, with as many layers as bring it next to the encoder-decoder's number of
parameters, and random weights: what it writes is noise, what it costs is not. It reads the source and a line
break, and writes as many tokens as the corrected sentence has. Both are exported in the same format and types, and
take turns, sentence by sentence, each in a process of its own. Quality is not compared: that would take training the
decoder on the same pairs.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from samples.random_weights import write_random
from skipstone.benchmark.measure import Runner, Sample, Series
from skipstone.benchmark.report import this_machine, write_json
from skipstone.bundle import open_bundle
from skipstone.exporters.pipeline import export_checkpoint
from skipstone.inputs import ModelInput
from skipstone.runtimes.text import TextCodec
from tests.peers.common import (
    ROOT,
    Settings,
    command_line,
    inputs_of,
    our_worker,
    parse_settings,
    runner_of,
    take_turns,
)
from tests.peers.line_protocol import Worker

ALONE = "decoder alone, plain"
STRATEGIES = ("plain", "aggressive", "auto")


def write_decoder(settings: Settings, parameters: int, folder: Path) -> tuple[int, int]:
    """A decoder of `coder`'s shape next to so many parameters; its layers and its parameters."""
    config = AutoConfig.from_pretrained(ROOT / "samples" / "models" / "coder")
    sizes = []
    for layers in (1, 2):
        config.num_hidden_layers = layers
        with torch.device("meta"):
            sizes.append(AutoModelForCausalLM.from_config(config).num_parameters())
    config.num_hidden_layers = 1 + round((parameters - sizes[0]) / (sizes[1] - sizes[0]))
    # near ties everywhere would fail the self-test of quantised exports
    written = write_random(config, settings.checkpoint, folder, residual_scale=0.02)
    return config.num_hidden_layers, written


def alone_runner(worker: Worker, line_break: tuple[int, ...], lengths: dict[tuple[int, ...], int]) -> Runner:
    """Plain decoding after the source and a line break, for as many tokens as are written of each sentence."""
    run = runner_of(worker, "plain", lambda given: lengths[tuple(given.prompt[: -len(line_break)])])
    return lambda given: run(ModelInput((*given.source, *line_break)))


def row_of(series: Series, plain: Series) -> dict[str, object]:
    """Medians over sentences and passes; seconds per sentence are from its start to its last token."""
    samples = [sample for passed in series.samples for sample in passed]
    others = [sample for passed in plain.samples for sample in passed]
    fresh = sum(len(sample.tokens) - 1 for sample in samples)
    return {
        "row": series.strategy,
        "tokens_per_second": fresh / sum(sample.decode_seconds for sample in samples),
        "ttft_ms": 1e3 * median(sample.first_seconds for sample in samples),
        "ms_per_sentence": 1e3 * median(map(total_seconds, samples)),
        "sentence_speedup": median(
            total_seconds(other) / total_seconds(sample)
            for sample, other in zip(samples, others, strict=True)
        ),
        "tokens_per_sentence": median(len(sample.tokens) for sample in samples),
    }


def total_seconds(sample: Sample) -> float:
    """Of a whole sentence."""
    return sample.first_seconds + sample.decode_seconds


def show(rows: Sequence[dict[str, object]]) -> None:
    """The rows as a table."""
    table = Table(box=SIMPLE_HEAD)
    names = ("row", "tok/s", "ttft ms", "ms a sentence", "× decoder alone")
    for name in names:
        table.add_column(name, justify="left" if name == "row" else "right", no_wrap=True)
    for row in rows:
        figures = ("tokens_per_second", "ttft_ms", "ms_per_sentence", "sentence_speedup")
        table.add_row(str(row["row"]), *(f"{row[figure]:.2f}" for figure in figures))
    Console(width=100).print(table)


def measure(settings: Settings, folder: Path, inputs: Sequence[ModelInput]) -> list[Series]:
    """Both in turns; the decoder alone writes as many tokens of a sentence as the encoder-decoder did."""
    alone_bundle = open_bundle(folder / "alone")
    codec = TextCodec(alone_bundle.file("tokenizer.json"), alone_bundle.manifest.model.vocab_size)
    line_break = tuple(codec.tokens("\n"))
    with our_worker(folder / "pair", settings) as pair, our_worker(folder / "alone", settings) as alone:
        plain = runner_of(pair, "plain", settings.max_new_tokens, settle=0.0)
        lengths = {tuple(given.source): max(2, len(plain(given).tokens)) for given in inputs}

        def make(name: str) -> Runner:
            if name == ALONE:
                return alone_runner(alone, line_break, lengths)
            return runner_of(pair, name, settings.max_new_tokens)

        make(ALONE)(inputs[0])
        return take_turns(make, (ALONE, *STRATEGIES), inputs, settings.repeats)


def main() -> None:
    """Entry point."""
    settings = parse_settings(
        "Compare with a decoder alone.",
        "decoder-alone.json",
        "q8_0",
        model="speller",
        prompts="speller_held_out.jsonl",
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        export_checkpoint(settings.checkpoint, folder / "pair", quantize=settings.quantize)
        parameters = open_bundle(folder / "pair").manifest.model.parameters
        layers, alone_parameters = write_decoder(settings, parameters, folder / "checkpoint")
        export_checkpoint(folder / "checkpoint", folder / "alone", quantize=settings.quantize, exits=())
        inputs = inputs_of(folder / "pair", settings)
        found = measure(settings, folder, inputs)
    rows = [row_of(series, found[0]) for series in found]
    show(rows)
    record = {
        "command": command_line(),
        "about": {
            "encoder_decoder_parameters": parameters,
            "decoder_alone_parameters": alone_parameters,
            "decoder_alone_layers": layers,
        },
        "machine": asdict(this_machine()),
        "threads": settings.threads,
        "quantization": settings.quantize,
        "sentences": len(inputs),
        "repeats": settings.repeats,
        "rows": rows,
    }
    write_json(settings.output, record)


if __name__ == "__main__":
    main()
