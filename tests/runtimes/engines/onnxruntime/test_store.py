"""K and V in the host's arrays, against a plain picture of what lies where."""

from __future__ import annotations

import numpy as np
import pytest

from skipstone.runtimes.engines.onnxruntime.store import KeyValueStore

LAYERS = {0: range(2), 1: range(2, 3)}
HEADS, SIZE, SLOTS = 2, 3, 150


def store(*, fixed: bool = False) -> KeyValueStore:
    return KeyValueStore(LAYERS, HEADS, SIZE, SLOTS, fixed=fixed)


def rows(count: int, arrays: int, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.standard_normal((1, HEADS, count, SIZE), np.float32) for _ in range(arrays)]


@pytest.mark.parametrize("slots", [[0, 1, 2], [5, 6, 7], [7, 2, 90], [63, 64, 65], [149]])
def test_rows_lie_in_their_slots_and_what_fills_a_batch_up_nowhere(slots: list[int]) -> None:
    kept, present = store(), rows(len(slots) + 2, 4)
    kept.write(0, slots, present)
    assert kept.capacity % 64 == 0 or kept.capacity == SLOTS
    assert kept.capacity > max(slots)
    for array, new in zip(kept.arrays[0].values(), present, strict=True):
        for index, slot in enumerate(slots):
            np.testing.assert_array_equal(array[0, :, slot], new[0, :, index])
        others = np.delete(array, slots, axis=2)
        assert not others.any()
    assert not any(array.any() for array in kept.arrays[1].values())


def test_growing_keeps_what_is_there_and_stops_at_the_last_slot() -> None:
    kept = store()
    assert kept.capacity == 64
    first = rows(64, 2)
    kept.write(1, range(64), first)
    kept.write(1, [149], rows(1, 2, seed=1))
    assert kept.capacity == SLOTS
    for array, new in zip(kept.arrays[1].values(), first, strict=True):
        np.testing.assert_array_equal(array[:, :, :64], new)
        assert array.flags.c_contiguous
    assert {array.shape for arrays in kept.arrays.values() for array in arrays.values()} == {
        (1, HEADS, SLOTS, SIZE)
    }


def test_fixed_slots_are_there_from_the_start() -> None:
    assert store(fixed=True).capacity == SLOTS


@pytest.mark.parametrize(
    ("sources", "targets"),
    [([5], [3]), ([7, 9, 12], [4, 5, 6]), ([6, 7, 8], [5, 6, 7]), ([8, 7], [7, 8]), ([], [])],
    ids=["one", "several", "overlapping", "swapped", "none"],
)
def test_moving_reads_everything_before_it_writes_in_every_layer(
    sources: list[int], targets: list[int]
) -> None:
    kept = store()
    kept.write(0, range(14), rows(14, 4))
    kept.write(1, range(14), rows(14, 2, seed=1))
    expected = [array.copy() for arrays in kept.arrays.values() for array in arrays.values()]
    for array in expected:
        array[:, :, targets] = array[:, :, sources].copy()
    kept.move(sources, targets)
    found = [array for arrays in kept.arrays.values() for array in arrays.values()]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
