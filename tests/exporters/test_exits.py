"""Which exits a model is cut at."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipstone.errors import CheckpointError, UsageError
from skipstone.exporters.exits import (
    check_exits,
    default_exits,
    recorded_encoder_exits,
    recorded_exits,
)


def test_the_default_for_twelve_layers_is_two_and_four() -> None:
    assert default_exits(12) == (2, 4)


@given(st.integers(1, 200), st.sampled_from([1, 4]))
def test_default_exits_are_valid_for_every_depth(num_layers: int, period: int) -> None:
    exits = default_exits(num_layers, period)
    assert check_exits(exits, num_layers, period) == exits
    assert exits or num_layers <= period


@given(st.sets(st.integers(1, 30)), st.randoms())
def test_exits_are_put_in_rising_order(exits: set[int], random: object) -> None:
    shuffled = list(exits)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert check_exits(shuffled, 31) == tuple(sorted(exits))


@pytest.mark.parametrize("exits", [(0,), (-1,), (12,), (13,), (3, 3)])
def test_exits_that_cannot_be_are_refused(exits: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="--exits"):
        check_exits(exits, 12)


def test_recorded_exits_come_from_the_file_before_the_configuration(tmp_path: Path) -> None:
    config = SimpleNamespace(skipstone_exits=[3, 5])
    assert recorded_exits(tmp_path, SimpleNamespace()) is None
    assert recorded_exits(tmp_path, config) == (3, 5)
    (tmp_path / "exits.json").write_text("[1, 2]", encoding="utf-8")
    assert recorded_exits(tmp_path, config) == (1, 2)
    (tmp_path / "exits.json").write_text('{"exits": [2, 6], "loss": 1.5}', encoding="utf-8")
    assert recorded_exits(tmp_path, config) == (2, 6)


def test_an_encoders_exits_are_recorded_beside_the_decoders(tmp_path: Path) -> None:
    config = SimpleNamespace(skipstone_exits=[1], skipstone_encoder_exits=[4])
    assert recorded_encoder_exits(tmp_path, SimpleNamespace()) is None
    assert recorded_encoder_exits(tmp_path, config) == (4,)
    for content, expected in (
        ('{"exits": [2]}', (4,)),
        ("[2]", (4,)),
        ('{"exits": [2], "encoder_exits": []}', ()),
    ):
        (tmp_path / "exits.json").write_text(content, encoding="utf-8")
        assert (recorded_exits(tmp_path, config), recorded_encoder_exits(tmp_path, config)) == (
            (2,),
            expected,
        )
    (tmp_path / "exits.json").write_text('{"exits": [2], "encoder_exits": "all"}', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"exits\.json"):
        recorded_encoder_exits(tmp_path, config)


def test_the_option_that_named_wrong_exits_is_named() -> None:
    with pytest.raises(UsageError, match="--encoder-exits 7: exit 7 is out of range for 6 layers"):
        check_exits((7,), 6, option="--encoder-exits")


@pytest.mark.parametrize("content", ["{}", "nonsense", '{"exits": "two"}', "[[1]]"])
def test_an_unreadable_exits_file_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "exits.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"exits\.json"):
        recorded_exits(tmp_path, SimpleNamespace())
