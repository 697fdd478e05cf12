"""Which exits a model is cut at: those asked for, those recorded with the checkpoint, or a default by
depth.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from skipstone.errors import CheckpointError, UsageError

EXITS_FILE = "exits.json"
_KEY, _ENCODER_KEY = "exits", "encoder_exits"
CONFIG_KEY, ENCODER_CONFIG_KEY = f"skipstone_{_KEY}", f"skipstone_{_ENCODER_KEY}"


def check_exits(
    exits: Sequence[int], num_layers: int, period: int = 1, option: str = "--exits"
) -> tuple[int, ...]:
    """The exits in rising order; `option` is what the user names them by.

    Raises:
        UsageError: out of 1 … num_layers - 1, twice the same, or not a multiple of `period`.
    """
    flag = f"{option} {','.join(map(str, exits))}"
    for exit_layer in exits:
        if not 0 < exit_layer < num_layers:
            raise UsageError(
                f"{flag}: exit {exit_layer} is out of range for {num_layers} layers",
                hint=f"an exit is a number of layers run, from 1 to {num_layers - 1}",
            )
        if exit_layer % period:
            raise UsageError(f"{flag}: this architecture can be cut at multiples of {period} only")
    if len(set(exits)) != len(exits):
        raise UsageError(f"{flag}: an exit is named twice")
    return tuple(sorted(exits))


def default_exits(num_layers: int, period: int = 1) -> tuple[int, ...]:
    """Two exits near a sixth and a third of the depth, one for shallow models: each cut costs a call per
    token.
    """
    parts = (1 / 6, 1 / 3) if num_layers >= 6 * period else (1 / 3,)
    rounded = {max(1, round(num_layers * part / period)) * period for part in parts}
    return tuple(sorted(exit_layer for exit_layer in rounded if exit_layer < num_layers))


def choose_exits(
    asked: Sequence[int] | None, recorded: Sequence[int] | None, num_layers: int, period: int = 1
) -> tuple[int, ...]:
    """The exits asked for, else those recorded, else `default_exits`; see `check_exits`."""
    wanted = recorded if asked is None else asked
    return check_exits(default_exits(num_layers, period) if wanted is None else wanted, num_layers, period)


def recorded_exits(folder: Path, config: Any) -> tuple[int, ...] | None:
    """Exits recorded with a checkpoint: exits.json ({"exits": [2, 4]} or a list) or the configuration's key; of an
    encoder-decoder, the decoder's.

    Raises:
        CheckpointError: exits.json is something else.
    """
    content = _exits_file(folder)
    if content is None:
        return _exits_in_config(config, CONFIG_KEY)
    return _checked(folder, lambda: content[_KEY] if isinstance(content, dict) else content)


def recorded_encoder_exits(folder: Path, config: Any) -> tuple[int, ...] | None:
    """Exits of the encoder recorded with a checkpoint: exits.json ({"exits": …, "encoder_exits": [3]}) or the
    configuration's key.

    Raises:
        CheckpointError: exits.json is something else.
    """
    content = _exits_file(folder)
    if not isinstance(content, dict) or _ENCODER_KEY not in content:
        return _exits_in_config(config, ENCODER_CONFIG_KEY)
    return _checked(folder, lambda: content[_ENCODER_KEY])


def _exits_in_config(config: Any, key: str) -> tuple[int, ...] | None:
    found = getattr(config, key, None)
    return None if found is None else tuple(int(exit_layer) for exit_layer in found)


def _exits_file(folder: Path) -> Any:
    """What exits.json holds, None where there is none."""
    file = folder / EXITS_FILE
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _not_exits(file, error) from error


def _checked(folder: Path, find: Callable[[], Any]) -> tuple[int, ...]:
    try:
        return tuple(int(exit_layer) for exit_layer in find())
    except (ValueError, TypeError, KeyError) as error:
        raise _not_exits(folder / EXITS_FILE, error) from error


def _not_exits(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f'{file}: {{"exits": [2, 4]}} was expected: {error}', hint="correct or remove the file"
    )
