"""Arms: what a record is worth, how fast it fades, and what is known of a stage from the text below it."""

from __future__ import annotations

import pytest

from skipstone.runtimes.drafters.ngram import NGramDrafter
from skipstone.runtimes.policies.arms import Arm, Record


def arm_with(*generations: tuple[int, float, float]) -> Arm:
    """An arm after generations of so many rounds, each of which yields so many tokens at such a price."""
    arm = Arm(NGramDrafter())
    for rounds, tokens, price in generations:
        for _ in range(rounds):
            arm.update(tokens, price)  # type: ignore[arg-type]
        arm.wake()
    return arm


@pytest.mark.parametrize(
    ("generations", "trusted"),
    [
        ((), False),
        (((4, 3, 2.0),), False),
        (((8, 3, 2.0),), True),
        (((3, 3, 2.0), (3, 3, 2.0), (3, 3, 2.0)), True),
        (((30, 2.1, 2.0),), False),
        (((10, 4, 2.0), (10, 1, 2.0)), True),
        (((10, 4, 2.0), (30, 1, 2.0)), False),
    ],
)
def test_a_speed_up_over_enough_drafting_earns_trust(
    generations: tuple[tuple[int, float, float], ...], trusted: bool
) -> None:
    assert arm_with(*generations).trusted is trusted


def test_a_record_fades_with_every_generation_and_slower_where_the_arm_was_not_used() -> None:
    arm = arm_with((10, 3, 2.0))
    assert arm.record == Record(10, 30, 20)
    arm.wake()
    assert arm.record == Record(pytest.approx(9.7), pytest.approx(29.1), pytest.approx(19.4))
    arm.update(1, 2.0)
    arm.wake()
    assert arm.record == Record(pytest.approx(9.73), pytest.approx(27.19), pytest.approx(19.46))


def test_a_record_outweighs_a_bad_start_but_not_a_bad_text() -> None:
    """It gains 1.5, with the weight of 30 plain tokens: 15 may be lost before the text speaks against it."""
    arm = arm_with(*[(10, 3, 2.0)] * 20)
    assert arm.gain == pytest.approx(1.5, abs=0.01)
    for lost in range(1, 20):
        arm.update(1, 2.0)
        assert (arm.speedup >= 1.0) == (lost < 15), lost


def test_what_was_seldom_tried_is_hoped_to_be_better_than_it_was() -> None:
    once, often = arm_with((1, 1, 1.0)), arm_with((200, 1, 1.0))
    assert once.hoped > once.speedup + 0.8
    assert often.hoped < often.speedup + 0.1


def pair() -> tuple[Arm, Arm]:
    """An arm of text, and one of a stage that builds on it."""
    text = Arm(NGramDrafter())
    return text, Arm(NGramDrafter(), 1.1, text)


def play(text: Arm, stage: Arm, rounds: int, tokens: float, added: float) -> None:
    """A generation of rounds in which the stage drafts: text alone would have yielded so many tokens, it yields more."""
    for _ in range(rounds):
        text.update(tokens, 2.0)  # type: ignore[arg-type]
        stage.update(tokens + added, 2.0, Record(1, tokens, 2.0))  # type: ignore[arg-type]


def test_a_stage_that_adds_nothing_is_known_not_to_however_texts_differ() -> None:
    """Text alone gains 2 in one text and 1.05 in the next; a fifth less is a fifth less in either."""
    text, stage = pair()
    for tokens in (4.0, 2.1) * 4:
        play(text, stage, 10, tokens, -0.2 * tokens)
        text.wake()
        stage.wake()
    for tokens in (4.0, 1.5):
        for _ in range(30):
            text.update(tokens, 2.0)  # type: ignore[arg-type]
        assert stage.speedup == pytest.approx(0.8 * text.speedup, rel=0.03)
        text.wake()
        stage.wake()


def test_a_stage_that_begins_to_add_is_noticed_within_a_text() -> None:
    text, stage = pair()
    for _ in range(6):
        play(text, stage, 10, 3.0, -0.6)
        text.wake()
        stage.wake()
    assert stage.speedup < text.speedup
    play(text, stage, 15, 3.0, 1.0)
    assert stage.speedup > text.speedup


def test_before_it_has_drafted_a_stage_is_taken_for_what_it_promises() -> None:
    text, stage = pair()
    assert stage.speedup == stage.promise
    for _ in range(20):
        text.update(4, 1.0)
    assert stage.speedup == stage.promise


def test_records_of_pairs_fade_as_all_others() -> None:
    record = Record(10, 30, 20, 25, 18)
    assert record.scaled(0.5) == Record(5, 15, 10, 12.5, 9)
    assert record.and_newer(Record(1, 2, 3, 4, 5)) == Record(11, 32, 23, 29, 23)
    assert record.over_text(1.0, 0.0) == pytest.approx((30 / 20) / (25 / 18))
    assert Record().over_text(1.05, 2.0) == 1.05
