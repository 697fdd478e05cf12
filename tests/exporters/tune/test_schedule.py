from __future__ import annotations

import math
from pathlib import Path

import pytest

from skipstone.exporters.tune.recipe import LayerSkip, Training
from skipstone.exporters.tune.schedule import Clock, dropout_rates, exit_turn, learning_rate_factor


def test_layer_dropout_follows_the_papers_exponential() -> None:
    # arXiv 2404.16710 §3.1.1 writes D(l) = e^(l ln2 / (L-1)) - 1, times p_max.
    expected = [0.2 * (math.exp(layer * math.log(2) / 11) - 1) for layer in range(12)]
    assert dropout_rates(0.2, 12) == pytest.approx(expected)


def test_the_first_layer_is_never_dropped_and_the_last_most() -> None:
    rates = dropout_rates(0.1, 7)
    assert rates[0] == 0.0
    assert rates[-1] == pytest.approx(0.1)
    assert list(rates) == sorted(rates)


def test_a_single_layer_is_never_dropped() -> None:
    assert dropout_rates(0.5, 1) == (0.0,)


def test_exits_take_turns_and_their_weight_grows_to_the_recipes() -> None:
    layerskip = LayerSkip(exit_weight=0.8, distil=0.5, ramp=0.5, start=0.25)
    rotation = ((2, 4), (3,))
    assert [exit_turn(layerskip, rotation, step, 0.0).exits for step in range(4)] == [
        (2, 4),
        (3,),
        (2, 4),
        (3,),
    ]
    turns = [exit_turn(layerskip, rotation, 0, progress) for progress in (0.0, 0.25, 0.5, 1.0)]
    assert [turn.weight for turn in turns] == pytest.approx([0.2, 0.5, 0.8, 0.8])
    assert [turn.distil for turn in turns] == pytest.approx([0.125, 0.3125, 0.5, 0.5])


def test_without_a_ramp_the_exits_weigh_in_full_from_the_first_step() -> None:
    assert exit_turn(LayerSkip(exit_weight=0.7, ramp=0.0, start=0.0), ((1,),), 0, 0.0).weight == 0.7


def test_the_learning_rate_warms_up_by_steps_and_ends_at_its_final_rate() -> None:
    training = Training(warmup_steps=10, final_rate=0.05)
    assert learning_rate_factor(training, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate_factor(training, 9, 0.0) == pytest.approx(1.0)
    assert learning_rate_factor(training, 500, 0.5) == pytest.approx(0.05 + 0.95 / 2)
    assert learning_rate_factor(training, 999, 1.0) == pytest.approx(0.05)


def test_the_clock_counts_the_limit_that_is_nearest() -> None:
    seconds = [100.0]
    clock = Clock(max_minutes=10, max_steps=50, now=lambda: seconds[0])
    clock.start()
    seconds[0] += 120
    assert clock.minutes == pytest.approx(2.0)
    assert clock.progress(5) == pytest.approx(0.2)
    assert clock.progress(30) == pytest.approx(0.6)
    seconds[0] += 6000
    assert clock.progress(30) == 1.0


def test_a_resumed_clock_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    seconds = [0.0]
    first = Clock(max_minutes=10, max_steps=None, now=lambda: seconds[0])
    first.start()
    seconds[0] = 180.0
    first.save(tmp_path)

    seconds[0] = 9_000.0  # time between the runs does not count
    second = Clock(max_minutes=10, max_steps=None, now=lambda: seconds[0])
    second.resume(tmp_path)
    second.start()
    assert second.progress(0) == pytest.approx(0.3)
    seconds[0] += 60
    assert second.progress(0) == pytest.approx(0.4)


def test_time_for_which_the_process_was_stopped_does_not_count() -> None:
    seconds = [0.0]
    clock = Clock(max_minutes=10, max_steps=None, now=lambda: seconds[0])
    clock.start()
    for took in (2.0, 2.0, 3600.0, 2.0):
        seconds[0] += took
        clock.step()
    assert clock.minutes == pytest.approx(4 * 2 / 60)


def test_steps_that_are_all_long_count() -> None:
    seconds = [0.0]
    clock = Clock(max_minutes=100, max_steps=None, now=lambda: seconds[0])
    clock.start()
    for took in (300.0, 200.0, 250.0):  # the first compiles
        seconds[0] += took
        clock.step()
    assert clock.minutes == pytest.approx(750 / 60)
