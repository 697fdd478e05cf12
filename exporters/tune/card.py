"""The model card that `tune` writes beside the weights."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from skipstone.exporters.tune.recipe import Recipe, exits_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from skipstone.exporters.tune.data import PackageShare
    from skipstone.exporters.tune.evaluate import ExitFigures, ExitReport


@dataclass(frozen=True)
class RunFacts:
    """What the card says of a run: how it was made and on what.

    Attributes:
        name: the model's name.
        origin: the checkpoint it continues, or "" when trained from scratch.
        command: the command that makes the model again.
        parameters: number of parameters, tied ones once.
        layers: decoder layers.
        steps: optimizer steps.
        tokens: tokens predicted in training, repeats counted.
        corpus_tokens: tokens of the training part of the corpus.
        minutes: minutes spent training.
        rotation: exits that had a loss, one set per step in turn.
    """

    name: str
    origin: str
    command: str
    parameters: int
    layers: int
    steps: int
    tokens: int
    corpus_tokens: int
    minutes: float
    rotation: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Description:
    """What a task's card says that others' do not.

    Attributes:
        pipeline: Hugging Face's name for what the model does.
        what: what the model is, up to its number of parameters and layers: "A decoder of {} and {}".
        exiting: how it exits.
        sections: sections between the exits and the making of it.
        data: what was made of the sources.
        limits: what it is not good for.
    """

    pipeline: str
    what: str
    exiting: str
    sections: tuple[str, ...]
    data: str
    limits: str


def model_card(
    facts: RunFacts,
    recipe: Recipe,
    shares: Iterable[PackageShare],
    report: ExitReport,
    description: Description,
) -> str:
    """The card's text in Markdown, figures taken from the report and the run."""
    sections = (
        _header(facts, description),
        _exits(facts, report),
        *description.sections,
        _making(facts, recipe),
        _data(recipe, list(shares), description.data),
        f"## Limits\n\n{description.limits}",
    )
    return "\n\n".join(sections) + "\n"


def _header(facts: RunFacts, description: Description) -> str:
    start = f"continued from `{facts.origin}`" if facts.origin else "trained from scratch"
    what = description.what.format(f"{facts.parameters / 1e6:.1f} M parameters", f"{facts.layers} layers")
    return f"""---
library_name: transformers
pipeline_tag: {description.pipeline}
tags: [early-exit, layerskip, self-speculative-decoding]
---

# {facts.name}

{what}, {start} with the
LayerSkip recipe: layer dropout and an early-exit loss ([paper](https://arxiv.org/abs/2404.16710)), its exits
distilled from its own last layer. {description.exiting} The folder is an ordinary Hugging Face checkpoint."""


def _exits(facts: RunFacts, report: ExitReport) -> str:
    header = ("exit", "loss (nats/token)", "agreement", "next-token accuracy")
    parts = [
        f"""## Exits on held-out text

{report.tokens:,} tokens of files that were not trained on. Agreement: how often an exit's most likely token
is the last layer's. Exits with a star had a loss of their own. The same figures are in `exit_report.json`.""",
        table(header, _rows(report.exits)),
    ]
    if report.encoder_exits:
        parts += [
            "The whole decoder behind an encoder that stops at an exit; those with a star were trained so:",
            table(("encoder " + header[0], *header[1:]), _rows(report.encoder_exits)),
        ]
    return "\n\n".join([*parts, "![loss and agreement by exit](exit_report.png)"])


def _rows(exits: Iterable[ExitFigures]) -> list[tuple[str, ...]]:
    return [
        (
            f"{figures.exit}{' *' if figures.trained else ''}",
            f"{figures.loss:.3f}",
            f"{figures.agreement:.3f}",
            f"{figures.accuracy:.3f}",
        )
        for figures in exits
    ]


def _making(facts: RunFacts, recipe: Recipe) -> str:
    exits = ", ".join(map(str, exits_of(facts.rotation)))
    return f"""## How it was made

```sh
{facts.command}
```

{facts.steps:,} steps in {facts.minutes:.0f} minutes saw {facts.tokens / 1e6:.1f} M tokens of a training
corpus of {facts.corpus_tokens / 1e6:.1f} M. A run limited by time gets as far as the machine's speed lets it,
so figures differ from machine to machine. Exits {exits} had a loss, in the rotation
{[list(group) for group in facts.rotation]}.

The recipe:

```toml
{to_toml(recipe)}
```"""


def _data(recipe: Recipe, shares: Sequence[PackageShare], use: str) -> str:
    total = sum(share.bytes for share in shares)
    rows = [
        (
            share.package,
            share.version,
            share.licence,
            str(share.files),
            str(share.held_out_files),
            f"{share.bytes / 1e6:.2f}",
            f"{share.bytes / total:.1%}",
        )
        for share in shares
    ]
    return f"""## Data

{use} A file is held out when the SHA-256 of its content is divisible by {recipe.corpus.held_out_modulus}; all
figures above come from those. Tests, vendored copies, tables and exact duplicates are left out. Versions and
licences are those that the packages' metadata state.

{table(("source", "version", "licence", "files", "held out", "MB", "share"), rows)}"""


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML that reads back to the same recipe, if it says nothing that its task does not use."""
    parts = asdict(recipe)
    task = parts.pop("task")
    unused = ("ternary",) if task == "seq2seq" else ("seq2seq", "noise")
    lines = [] if task == Recipe().task else [f'task = "{task}"']
    for name, fields in parts.items():
        if name not in unused:
            lines += ["", f"[{name}]"] if lines else [f"[{name}]"]
            lines += [f"{key} = {_toml_value(value)}" for key, value in fields.items()]
    text = "\n".join(lines)
    tomllib.loads(text)
    return text


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
