"""Tiny checkpoints, made once per session."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.exporters.tiny import CASES, GENTLE, make_checkpoint
from tests.exporters.tiny_t5 import T5_CASES, make_t5

MakeTiny = Callable[[str], Path]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> MakeTiny:
    """Folder of the tiny checkpoint of that name (`tests.exporters.tiny.CASES`); not to be changed."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make_checkpoint(
                tmp_path_factory.mktemp("tiny") / name, GENTLE if name == "gentle" else CASES[name]
            )
        return made[name]

    return get


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> MakeTiny:
    """Folder of the tiny T5 of that name (`tests.exporters.tiny_t5.T5_CASES`); not to be changed."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make_t5(tmp_path_factory.mktemp("tiny-t5") / name, T5_CASES[name])
        return made[name]

    return get
