"""What a tuning run does, as data: the corpus, the LayerSkip objective and the optimisation.

    >>> recipe = load_recipe("samples/recipes/coder.toml")
    >>> recipe = load_recipe("layerskip")  # the defaults, exits chosen from the model's depth

A recipe is a TOML file with the tables `[corpus]`, `[layerskip]`, `[training]` and `[ternary]`, each key being a field
of the data class of that name. `task = "seq2seq"` above them makes it one for encoder-decoders, which has the tables
`[seq2seq]` and `[noise]` too. Unknown keys and values out of range are refused.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from skipstone.errors import SkipstoneError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0.0)]

BUILT_IN = "layerskip"


@dataclass(frozen=True)
class Corpus:
    """Python sources of the standard library and of installed packages, and how they are split.

    A file is held out when `sha256(content) % held_out_modulus == 0`, so copies of a file are on one side.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    packages: tuple[str, ...] = ()
    standard_library: bool = False
    max_share: Fraction = 0.2
    max_file_bytes: Positive = 300_000
    held_out_modulus: Positive = 50


@dataclass(frozen=True)
class LayerSkip:
    """The objective of LayerSkip (arXiv 2404.16710 §3) with the exits distilled from the last layer.

    - `max_dropout`: p_max of the layer dropout p_l = p_max * (2^(l/(L-1)) - 1), §3.1.1.
    - `rotation`: the exits that get a loss, one set per step in turn (the rotational curriculum of §3.1.2);
      an exit is the number of layers run, so L is the last. Empty: chosen from the depth.
    - `exit_weight`: what a step's exits weigh together against the last layer's loss, after the ramp.
    - `distil`: share of the last layer's distribution in an exit's target after the ramp; the rest is the
      data.
    - `ramp`: part of the run over which `exit_weight` and `distil` grow linearly from `start` of their value.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    max_dropout: Fraction = 0.05
    rotation: tuple[tuple[Positive, ...], ...] = ()
    exit_weight: Annotated[float, Field(ge=0.0)] = 0.8
    distil: Fraction = 0.75
    ramp: Fraction = 0.3
    start: Fraction = 0.2


@dataclass(frozen=True)
class Training:
    """Optimisation: Muon on the layers' matrices (`matrix_learning_rate` > 0) and AdamW on the rest.

    Learning rates warm up over `warmup_steps`, then fall along a cosine of the run's progress to
    `final_rate` of the peak. `sequence_length` is in tokens, `batch_size` in sequences per device.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    sequence_length: Positive = 512
    batch_size: Positive = 16
    learning_rate: Annotated[float, Field(gt=0.0)] = 3e-3
    matrix_learning_rate: Annotated[float, Field(ge=0.0)] = 0.0
    warmup_steps: Positive = 100
    final_rate: Fraction = 0.03
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    seed: int = 0
    compile: bool = True


@dataclass(frozen=True)
class Ternary:
    """Weights of -1, 0 and 1 times a scale in the linear layers of a decoder's blocks (BitNet b1.58, arXiv 2402.17764).

    - `scale`: of each matrix: `mean` of its magnitudes, or their `median`; `none`: weights are trained as they are.
    - `activation_bits`: that inputs of these layers are rounded to while training; 0: they are not.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    scale: Literal["none", "mean", "median"] = "none"
    activation_bits: Literal[0, 8] = 8


@dataclass(frozen=True)
class Seq2Seq:
    """What an encoder-decoder learns beside its decoder's exits: its encoder's.

    With probability `encoder_share` a sequence's encoder stops at one of `encoder_exits` (a number of layers run),
    goes through the encoder's final norm there, and the decoder attends to that. The share grows as the weight of
    the decoder's exits does. `alignment_weight` is that of the loss which shows one head of every decoder layer the
    place in the source that the next target comes from; 0: they find it by themselves.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    encoder_exits: tuple[Positive, ...] = ()
    encoder_share: Fraction = 0.25
    alignment_weight: Weight = 0.0


@dataclass(frozen=True)
class Noise:
    """How clean sentences are made wrong: how often, and the weights of the kinds of slips.

    A sentence stays clean with probability `clean`; else its share of wrong words is exponentially distributed with
    mean `rate`, at most `max_rate`, and at least one word is wrong if any can be. All other fields are weights: a
    word gets a slip of one of the kinds that apply to it, in proportion; 0 turns a kind off.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    clean: Fraction = 0.15
    rate: Annotated[float, Field(gt=0.0, le=1.0)] = 0.12
    max_rate: Fraction = 0.6
    neighbour: Weight = 1.0
    insert: Weight = 0.6
    swap: Weight = 1.0
    drop: Weight = 1.2
    double: Weight = 0.6
    vowel: Weight = 0.8
    misspelling: Weight = 1.0
    join: Weight = 0.5
    split: Weight = 0.5
    repeat: Weight = 0.2
    case: Weight = 0.5
    agreement: Weight = 6.0
    number: Weight = 0.6
    article: Weight = 6.0
    confusion: Weight = 6.0


@dataclass(frozen=True)
class Recipe:
    """A whole tuning recipe; see the data classes of its parts. `seq2seq` and `noise` are for that task alone."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    task: Literal["decoder", "seq2seq"] = "decoder"
    corpus: Corpus = field(default_factory=Corpus)
    layerskip: LayerSkip = field(default_factory=LayerSkip)
    seq2seq: Seq2Seq = field(default_factory=Seq2Seq)
    noise: Noise = field(default_factory=Noise)
    training: Training = field(default_factory=Training)
    ternary: Ternary = field(default_factory=Ternary)


def load_recipe(source: str | Path) -> Recipe:
    """Read a recipe file, or the built-in one when `source` is "layerskip".

    Raises SkipstoneError naming the file and the key for anything that is not a valid recipe.
    """
    if str(source) == BUILT_IN:
        return Recipe()
    path = Path(source)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SkipstoneError(
            f"--recipe {path}: cannot be read ({error})",
            hint=f"give the name {BUILT_IN!r} or a recipe file such as samples/recipes/coder.toml",
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise SkipstoneError(
            f"{path}: not valid TOML ({error})", hint="correct the file and run again"
        ) from error
    return parse_recipe(content, name=str(path))


def parse_recipe(content: dict[str, object], *, name: str) -> Recipe:
    """Validate the parsed TOML `content` of a recipe called `name` in error messages."""
    try:
        recipe = TypeAdapter(Recipe).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise SkipstoneError(
            f"{name}: {key}: {first['msg']}",
            hint="docs/tune.md lists every key of a recipe, its meaning and its range",
        ) from error
    if recipe.task == "seq2seq" and recipe.ternary.scale != "none":
        raise SkipstoneError(
            f"{name}: ternary.scale: decoders alone are trained to ternary weights",
            hint='leave [ternary] out, or task = "seq2seq"',
        )
    return recipe


def exits_of(rotation: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """Every exit that a rotation trains, in rising order."""
    return tuple(sorted({exit_layer for group in rotation for exit_layer in group}))


def rotation_for(layerskip: LayerSkip, num_layers: int) -> tuple[tuple[int, ...], ...]:
    """The recipe's rotation, checked against a model of `num_layers` layers, or the default for that depth.

    The default trains the exits nearest L/6, L/4, L/3, L/2 and 2L/3, two a step, the early ones most often:
    drafts come from them.
    """
    if layerskip.rotation:
        wrong = [e for e in exits_of(layerskip.rotation) if e >= num_layers]
        if wrong:
            raise SkipstoneError(
                f"layerskip.rotation: exit {wrong[0]} is not below the last layer, {num_layers}",
                hint=f"an exit is a number of layers run, from 1 to {num_layers - 1} for this model",
            )
        return layerskip.rotation
    if num_layers < 2:
        raise SkipstoneError(
            f"the model has {num_layers} layer and so no early exit",
            hint="tune a model of two or more layers",
        )
    first, second, third, middle, late = (
        min(num_layers - 1, max(1, round(num_layers * part))) for part in (1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3)
    )
    groups = ((first, third), (second, middle), (first, third), (second, late))
    return tuple(tuple(sorted(set(group))) for group in groups)
