"""Which steps a run takes, in order: from a recipe file or from flags.

[[step]]
kind = "drop_layers"
count = 3
by = "cosine"

[[step]]
kind = "quantize"
method = "gptq"

>>> load_recipe(Path("recipe.toml"))
>>> parse_steps(["drop_layers:count=3,by=cosine", "quantize:method=gptq"])  # the same
"""

from __future__ import annotations

import json
import tomllib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic import ValidationError

from skipstone.errors import UsageError
from skipstone.exporters.compress.steps import Step, step_class
from skipstone.exporters.facts import read_text

_TABLE = "step"
_SEPARATOR = "+"


def load_recipe(path: Path) -> tuple[Step, ...]:
    """The steps of a recipe file: TOML with one `[[step]]` table each, whose `kind` says which and whose other keys are
    its options.

    Raises:
        UsageError: naming the file and the key that is wrong.
    """
    try:
        content = tomllib.loads(read_text(path, "--recipe"))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"--recipe {path}: not valid TOML ({error})", hint="correct the file") from error
    unknown = sorted(content.keys() - {_TABLE})
    tables = content.get(_TABLE)
    if unknown or not isinstance(tables, list) or not tables:
        found = f"{unknown[0]}: unknown key" if unknown else f"no [[{_TABLE}]] found"
        raise UsageError(
            f"--recipe {path}: {found}", hint=f'begin with [[{_TABLE}]] and kind = "drop_layers"'
        )
    return tuple(
        make_step(table, f"--recipe {path}: {_TABLE} {number}") for number, table in enumerate(tables, 1)
    )


def parse_steps(flags: Sequence[str]) -> tuple[Step, ...]:
    """Steps from `--compress` flags, in order: `kind:key=value,key=value`.

    A list is written with +, as `layers=3+5`; a mapping as `mix=0-1:q8_0+head:q6_k`.

    Raises:
        UsageError: naming the flag and the key that is wrong.
    """
    return tuple(_parse(flag) for flag in flags)


def make_step(options: Any, name: str) -> Step:
    """A step from its options.

    Args:
        options: a mapping with the key `kind`.
        name: of the mapping in error messages.

    Raises:
        UsageError: an unknown kind or option, or a value that does not fit.
    """
    options = dict(options) if isinstance(options, Mapping) else {}
    kind = options.pop("kind", None)
    if not isinstance(kind, str):
        raise UsageError(f"{name}: no kind found", hint='name the step, say kind = "drop_layers"')
    try:
        return step_class(kind)(**options)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        taken = ", ".join(step_class(kind).model_fields)
        raise UsageError(
            f"{name}: {kind}{'.' if key else ''}{key}: {first['msg']}", hint=f"{kind} takes {taken}"
        ) from error
    except UsageError as error:
        raise UsageError(f"{name}: {error.message}", hint=error.hint) from error


def options_of(step: Step) -> dict[str, Any]:
    """A step's kind and those of its options that are not the defaults, as a recipe has them; JSON."""
    return {"kind": step.kind, **step.model_dump(mode="json", exclude_defaults=True)}


def recipe_text(steps: Sequence[Step]) -> str:
    """The recipe file that gives these steps."""
    tables = [
        "\n".join([f"[[{_TABLE}]]", *(f"{key} = {_toml(value)}" for key, value in options_of(step).items())])
        for step in steps
    ]
    return "\n\n".join(tables) + "\n"


def _parse(flag: str) -> Step:
    kind, _, rest = flag.partition(":")
    name = f"--compress {flag}"
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key in options:
            raise UsageError(
                f"{name}: {part!r}: key=value was expected, every key once", hint="say drop_layers:count=3"
            )
        options[key] = value
    try:
        fields = step_class(kind.strip()).model_fields
    except UsageError as error:
        raise UsageError(f"{name}: {error.message}", hint=error.hint) from error
    typed = {
        key: _value(value, fields[key].annotation) if key in fields else value
        for key, value in options.items()
    }
    return make_step({"kind": kind.strip(), **typed}, name)


def _value(text: str, annotation: Any) -> Any:
    """A flag's text as what the field takes: lists and mappings taken apart, the rest left to the record."""
    kinds = [get_origin(kind) for kind in _alternatives(annotation)]
    if dict in kinds:
        pairs = (part.partition(":") for part in filter(None, text.split(_SEPARATOR)))
        return {key: value for key, _, value in pairs}
    if tuple in kinds:
        return [part for part in text.split(_SEPARATOR) if part]
    return text


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _toml(value: Any) -> str:
    """A value of JSON in TOML, which writes strings, numbers, booleans and lists of them alike."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)
