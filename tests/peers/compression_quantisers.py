"""Hold compression's quantisers against rounding to the nearest code, at equal size, on the shipped models.

    python -m tests.peers.compression_quantisers                    the decoder
    python -m tests.peers.compression_quantisers --checkpoint samples/models/speller \
        --calibration samples/calibration/prose.jsonl --held-out samples/prompts/speller_held_out.jsonl \
        --output docs/benchmarks/compression-quantisers-speller.json    the encoder-decoder

Every method chooses codes in the same layouts, so that the rows of one scheme take the same bytes to the last. What each
comes to is measured on text that none saw (samples/prompts/held_out.jsonl): divergence from the dense model, perplexity,
and how often the best token at every exit of the decoder is the one that the dense model has there. Calibration text is
cut from files that the decoder was trained on, if none is named. Mixed precision gives every matrix its own layout (a
T5's two attentions of a layer share theirs), by what the model loses when that matrix alone is rounded, within the
bytes that all matrices take in one layout. The table goes to docs/benchmarks/compression-quantisers.json.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from skipstone.benchmark.report import this_machine, write_json
from skipstone.exporters.checkpoint import load_eager
from skipstone.exporters.compress.fidelity import measure_fidelity
from skipstone.exporters.compress.folder import measure_size
from skipstone.exporters.compress.quantize.grid import grid_of
from skipstone.exporters.compress.quantize.plan import layouts, linear_names
from skipstone.exporters.compress.quantize.step import Quantize
from skipstone.exporters.compress.recipe import options_of
from skipstone.exporters.compress.shapes import facts_of, open_source
from skipstone.exporters.compress.steps import Target
from skipstone.exporters.compress.texts import read_windows
from skipstone.exporters.compress.work import Windows, Work
from skipstone.exporters.exits import recorded_encoder_exits, recorded_exits
from skipstone.exporters.facts import load_tokenizer
from skipstone.exporters.tune.data import collect
from skipstone.exporters.tune.recipe import load_recipe
from tests.peers.common import ROOT, command_line

_LINES = 60  # of a file's middle, as the held-out text was cut
_PACKAGES = ("jinja2", "networkx", "rich")  # of the decoder's training corpus
_SCHEMES = {8: ("q8_0", "8da8w"), 4: ("q4_k_m", "q4_0", "8da4w"), 3: ("q3_k_m",), 2: ("q2_k",)}
_METHODS: Mapping[str, dict[str, str]] = {
    "rtn": {},
    "imatrix": {"method": "imatrix"},
    "hqq": {"method": "hqq"},
    "awq": {"fold": "awq"},
    "smoothquant": {"fold": "smoothquant"},
    "gptq": {"method": "gptq"},
    "awq + gptq": {"fold": "awq", "method": "gptq"},
}
_TABLES = "q6_k"  # the scheme of mixed precision, which the embedding keeps
_ALIKE = ("q4_k", "q3_k")  # all matrices in one layout: the budgets of mixed precision
_LEVELS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
_SENSITIVITY_TOKENS = 1024


@dataclass(frozen=True)
class Settings:
    """The command line."""

    checkpoint: Path
    recipe: Path
    calibration: Path | None
    held_out: Path
    schemes: tuple[str, ...]
    methods: tuple[str, ...]
    mixed: bool
    tokens: int
    held_out_tokens: int
    output: Path


@dataclass(frozen=True)
class Outcome:
    """What one way to quantise came to.

    Attributes:
        bits: of a weight, roughly.
        scheme: all rows of one scheme take the same bytes, or no more.
        method: see `_METHODS`; of mixed precision, `all in …` or `mixed …`.
        options: of the step.
        num_bytes: of all weights, scales and embedding included.
        kl: divergence from the dense model on held-out text, nats per token.
        perplexity: on held-out text.
        agreement: share of positions with the dense model's best token.
        exits: by exit, the share of positions with the best token of the dense model's exit.
        seconds: of the step.
    """

    bits: int
    scheme: str
    method: str
    options: dict[str, Any]
    num_bytes: int
    kl: float
    perplexity: float
    agreement: float
    exits: dict[int, float]
    seconds: float


class Comparison:
    """Ways to quantise the same model, with the same texts."""

    def __init__(self, settings: Settings, calibration: Path) -> None:
        self._settings = settings
        checkpoint = open_source(settings.checkpoint)
        self._tokenizer, facts = load_tokenizer(checkpoint), facts_of(checkpoint)
        self._exits = recorded_exits(checkpoint.path, checkpoint.config)
        self._encoder_exits = recorded_encoder_exits(checkpoint.path, checkpoint.config)
        self._calibration, self._held_out = (
            read_windows(file, flag, self._tokenizer, facts, tokens)
            for file, flag, tokens in (
                (calibration, "--calibration", settings.tokens),
                (settings.held_out, "--held-out", settings.held_out_tokens),
            )
        )

    def outcome(self, bits: int, scheme: str, method: str, step: Quantize) -> Outcome:
        """What a step comes to."""
        work = Work(
            self._settings.checkpoint, Target(), self._tokenizer, self._calibration,
            exits=self._exits, encoder_exits=self._encoder_exits,
        )  # fmt: skip
        model, start = load_eager(self._settings.checkpoint), time.perf_counter()
        step.apply(model, work)
        seconds = time.perf_counter() - start
        found = measure_fidelity(model, work, self._held_out)
        return Outcome(
            bits, scheme, method, options_of(step), measure_size(model, work).num_bytes,
            found.kl_divergence, found.perplexity, found.agreement,
            {one.exit: one.dense for one in found.exits}, seconds,
        )  # fmt: skip

    def methods(self) -> Iterator[Outcome]:
        """Every method in every scheme."""
        for bits, schemes in _SCHEMES.items():
            for scheme in schemes:
                for method in self._settings.methods if scheme in self._settings.schemes else ():
                    yield self.outcome(bits, scheme, method, Quantize(scheme=scheme, **_METHODS[method]))

    def mixes(self) -> Iterator[Outcome]:
        """All matrices in one layout, and layouts by matrix in as many bytes, each with two methods."""
        model = load_eager(self._settings.checkpoint)
        places = places_of(model)
        lost = sensitivities(model, places, self._calibration.first(_SENSITIVITY_TOKENS))
        sizes = {
            place: {
                level: sum(grid_of(level).num_bytes(*model.get_parameter(name).shape) for name in names)
                for level in _LEVELS
            }
            for place, names in places.items()
        }
        for alike in _ALIKE:
            bits, scheme = int(alike[1]), f"{_TABLES}, as all in {alike}"
            chosen = allocate(lost, sizes, sum(size[alike] for size in sizes.values()))
            mixes = {f"all in {alike}": dict.fromkeys(places, alike), "mixed": chosen}
            for way, mix in mixes.items():
                for method in ("rtn", "gptq"):
                    step = Quantize(scheme=_TABLES, mix=mix, method=method)
                    assert set(layouts(model, _TABLES, mix).values()) <= {*_LEVELS, "q8_0"}
                    yield self.outcome(bits, scheme, f"{way}, {method}", step)


def places_of(model: Any) -> dict[str, list[str]]:
    """By place, as the step's `mix` names it, the matrices there: two where a T5's decoder has two attentions."""
    found: dict[str, list[str]] = {}
    for (stack, layer, part), name in linear_names(model).items():
        side = "encoder." if stack == "encoder" else ""
        found.setdefault(f"{side}{layer}.{part.rpartition('.')[2]}", []).append(name)
    return found


@torch.no_grad()
def sensitivities(model: Any, places: Mapping[str, list[str]], text: Windows) -> dict[str, dict[str, float]]:
    """By place and layout, the divergence from the dense model when that place alone is rounded, nats per token."""
    expected = [log_probabilities(model, inputs) for inputs in text.inputs()]
    found: dict[str, dict[str, float]] = {}
    for place, names in places.items():
        weights = [model.get_parameter(name) for name in names]
        before = [weight.clone() for weight in weights]
        for level in _LEVELS:
            for weight, dense in zip(weights, before, strict=True):
                parts = grid_of(level).fit(dense, None)
                weight.copy_(grid_of(level).levels(parts).values(grid_of(level).codes(parts)))
            total = sum(
                float((p.exp() * (p - log_probabilities(model, inputs))).sum())
                for p, inputs in zip(expected, text.inputs(), strict=True)
            )
            found.setdefault(place, {})[level] = total / sum(map(len, expected))
        for weight, dense in zip(weights, before, strict=True):
            weight.copy_(dense)
    return found


def log_probabilities(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """float32 [n, vocab_size]."""
    return functional.log_softmax(model(**inputs).logits[0], -1)


def allocate(
    lost: Mapping[str, Mapping[str, float]], sizes: Mapping[str, Mapping[str, int]], budget: int
) -> dict[str, str]:
    """By place, a layout: from the smallest on, whatever step up gains most per byte, as long as it fits.

    Args:
        lost: by place and layout, what it costs in divergence; taken to add up.
        sizes: likewise, bytes.
        budget: bytes of all.
    """
    chosen = {name: min(levels, key=lambda level: levels[level]) for name, levels in sizes.items()}
    left = budget - sum(sizes[name][level] for name, level in chosen.items())
    while True:
        steps = [
            ((lost[name][now] - lost[name][level]) / (size - sizes[name][now]), name, level)
            for name, now in chosen.items()
            for level, size in sizes[name].items()
            if 0 < size - sizes[name][now] <= left
        ]
        if not steps or max(steps)[0] <= 0:
            return chosen
        _, name, level = max(steps)
        left -= sizes[name][level] - sizes[name][chosen[name]]
        chosen[name] = level


def write_calibration(recipe: Path, file: Path) -> None:
    """Text of files that were trained on, one after the other from each package."""
    corpus = replace(load_recipe(recipe).corpus, packages=_PACKAGES, standard_library=False, max_share=1.0)
    sources = [source for source in collect(corpus) if not source.held_out]
    by_package = [[source for source in sources if source.package == name] for name in _PACKAGES]
    with file.open("w", encoding="utf-8") as out:
        for source in chain.from_iterable(zip(*by_package, strict=False)):
            lines = source.text.splitlines(keepends=True)
            first = max(0, (len(lines) - _LINES) // 2)
            out.write(json.dumps({"text": "".join(lines[first : first + _LINES])}) + "\n")


def parse_settings() -> Settings:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    samples = ROOT / "samples"
    parser.add_argument("--checkpoint", type=Path, default=samples / "models" / "coder")
    parser.add_argument("--recipe", type=Path, default=samples / "recipes" / "coder-further.toml")
    parser.add_argument("--calibration", type=Path, help="default: cut from the recipe's corpus")
    parser.add_argument("--held-out", type=Path, default=samples / "prompts" / "held_out.jsonl")
    every = [scheme for schemes in _SCHEMES.values() for scheme in schemes]
    parser.add_argument("--schemes", nargs="*", choices=every, default=every)
    parser.add_argument("--methods", nargs="*", choices=list(_METHODS), default=list(_METHODS))
    parser.add_argument("--mixed", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--held-out-tokens", type=int, default=4096)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "benchmarks" / "compression-quantisers.json"
    )
    return Settings(**vars(parser.parse_args()))


def show(outcomes: list[Outcome]) -> None:
    """A table."""
    exits = list(outcomes[0].exits)
    table = Table(box=SIMPLE_HEAD)
    for column in ("scheme", "method", "MB", "KL", "perplexity", "agreement", *(f"exit {n}" for n in exits)):
        table.add_column(column)
    for one in outcomes:
        shares = (one.agreement, *(one.exits[number] for number in exits))
        table.add_row(
            one.scheme, one.method, f"{one.num_bytes / 1e6:.2f}", f"{one.kl:.4f}", f"{one.perplexity:.3f}",
            *(f"{share:.1%}" for share in shares),
        )  # fmt: skip
    Console(width=130).print(table)


def keep(settings: Settings, outcomes: list[Outcome]) -> None:
    """Write what there is so far."""
    kept = {
        "command": command_line(),
        "machine": asdict(this_machine()),
        "settings": {key: value for key, value in vars(settings).items() if not isinstance(value, Path)},
        "calibration_packages": None if settings.calibration else _PACKAGES,
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }
    write_json(settings.output, kept)


def main() -> None:
    """Compare, show and keep."""
    settings = parse_settings()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="skipstone-") as folder:
        calibration = settings.calibration or Path(folder) / "calibration.jsonl"
        if settings.calibration is None:
            write_calibration(settings.recipe, calibration)
        comparison = Comparison(settings, calibration)
        for outcome in chain(comparison.methods(), comparison.mixes() if settings.mixed else ()):
            print(outcome.scheme, outcome.method, outcome.num_bytes, f"{outcome.kl:.4f}", flush=True)
            outcomes.append(outcome)
            keep(settings, outcomes)
    show(outcomes)


if __name__ == "__main__":
    main()
