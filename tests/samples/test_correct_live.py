"""Correcting while one types, with keys from a pipe and a corrector that does what it is told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from samples.corrector.live import Editor, sentence_at

TAB, UNDO, LEFT, HOME, CTRL_C, CTRL_D = "\t", "\x1f", "\x1b[D", "\x01", "\x03", "\x04"
Send = Callable[[str], None]


def fix(sentence: str) -> str:
    return sentence.replace("Their", "There").replace("a eror", "an error").replace("teh", "the")


def edit(
    script: Callable[[Editor, Send], Awaitable[None]],
    correct: Callable[[str], str] = fix,
    pause: float = 0.01,
) -> str | None:
    """Run an editor and a script of keys, then Ctrl-D; returns the text."""

    async def drive() -> str | None:
        with (
            create_pipe_input() as keys,
            create_app_session(input=keys, output=DummyOutput()),
            ThreadPoolExecutor(max_workers=1) as worker,
        ):
            editor = Editor(correct, worker, marked=True, pause=pause)
            running = asyncio.create_task(editor.run())
            await script(editor, keys.send_text)
            keys.send_text(CTRL_D)
            return await asyncio.wait_for(running, 20)

    return asyncio.run(drive())


def shown(editor: Editor) -> str:
    return "".join(fragment[1] for fragment in editor.correction())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def test_a_correction_is_shown_and_taken_over_with_tab() -> None:
    async def script(editor: Editor, send: Send) -> None:
        send("All good. Their is a eror ")
        await until(lambda: "{+" in shown(editor))
        assert shown(editor) == "[-Their-]{+There+} is [-a-]{+an+} [-eror-]{+error+}"
        assert editor.buffer.text == "All good. Their is a eror "
        send(TAB)
        await until(lambda: "There" in editor.buffer.text)
        send("here.")

    assert edit(script) == "All good. There is an error here."


def test_only_the_sentence_under_the_cursor_is_corrected_and_the_cursor_keeps_its_place() -> None:
    asked: list[str] = []

    def correct(sentence: str) -> str:
        asked.append(sentence)
        return fix(sentence)

    async def script(editor: Editor, send: Send) -> None:
        send("Go teh end. Then teh other.")
        await until(lambda: "{+" in shown(editor))
        send(LEFT * len("end. Then teh other."))
        await until(lambda: shown(editor) == "Go [-teh-]{+the+} end.")
        send(TAB)
        await until(lambda: "the" in editor.buffer.text)
        send("very ")

    assert edit(script, correct) == "Go the very end. Then teh other."
    assert asked[:2] == ["Then teh other.", "Go teh end. "]


def test_typing_never_waits_and_an_answer_to_outdated_text_is_dropped() -> None:
    asked: list[str] = []
    release = [threading.Event(), threading.Event()]
    threads: set[int] = set()

    def correct(sentence: str) -> str:
        threads.add(threading.get_ident())
        asked.append(sentence)
        if len(asked) <= len(release):
            assert release[len(asked) - 1].wait(20)
        return f"answer {len(asked)} to {sentence}"

    async def script(editor: Editor, send: Send) -> None:
        send("One")
        await until(lambda: asked == ["One"])
        assert shown(editor) == "…"
        for character in " two three":
            send(character)
        await until(lambda: editor.buffer.text == "One two three")  # while the worker is held
        assert asked == ["One"]
        release[0].set()
        while len(asked) < 2:  # the answer to "One" comes a pause before the next question
            assert "answer" not in shown(editor)
            await asyncio.sleep(0.005)
        send(TAB)
        release[1].set()
        await until(lambda: "answer 2" in shown(editor))

    assert edit(script, correct, pause=0.2) == "One two three"
    assert asked == ["One", "One two three"]
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_the_model_is_asked_after_a_pause_and_not_at_every_key() -> None:
    asked: list[str] = []

    def correct(sentence: str) -> str:
        asked.append(sentence)
        return sentence

    async def script(editor: Editor, send: Send) -> None:
        for character in "typed in one go":
            send(character)
            await asyncio.sleep(0.001)
        await until(lambda: shown(editor) == "no correction")

    edit(script, correct, pause=0.5)
    assert asked == ["typed in one go"]


def test_a_correction_taken_over_can_be_undone() -> None:
    async def script(editor: Editor, send: Send) -> None:
        send("teh end")
        await until(lambda: "{+" in shown(editor))
        send(TAB)
        await until(lambda: editor.buffer.text == "the end")
        send(UNDO)
        await until(lambda: editor.buffer.text == "teh end")

    assert edit(script) == "teh end"


def test_tab_without_a_correction_does_nothing() -> None:
    async def script(editor: Editor, send: Send) -> None:
        send(f"{TAB}fine{TAB}")
        await until(lambda: shown(editor) == "no correction")
        send(TAB)

    assert edit(script) == "fine"


def test_blank_text_is_not_corrected() -> None:
    async def script(editor: Editor, send: Send) -> None:
        send("  \r \r")
        await until(lambda: editor.buffer.text.count("\n") == 2)
        await asyncio.sleep(0.1)

    def correct(sentence: str) -> str:
        raise AssertionError(f"asked for {sentence!r}")

    assert (edit(script, correct) or "?").strip() == ""


def test_a_failing_model_is_told_and_costs_no_text() -> None:
    def correct(sentence: str) -> str:
        if "bad" in sentence:
            raise MemoryError("too much")
        return fix(sentence)

    async def script(editor: Editor, send: Send) -> None:
        send("bad teh")
        await until(lambda: shown(editor) == "no correction: too much")
        send(f"{TAB}{HOME}Fine teh. ")
        await until(lambda: shown(editor) != "no correction: too much")

    assert edit(script, correct) == "Fine teh. bad teh"


def test_ending_does_not_wait_for_a_pause() -> None:
    async def script(_editor: Editor, send: Send) -> None:
        send("short")

    assert edit(script, pause=1000.0) == "short"


def test_control_c_throws_the_text_away() -> None:
    async def script(_editor: Editor, send: Send) -> None:
        send(f"text{CTRL_C}")

    assert edit(script) is None


@pytest.mark.parametrize(
    ("text", "cursor", "start", "sentence"),
    [
        ("", 0, 0, ""),
        ("One", 0, 0, "One"),
        ("One", 3, 0, "One"),
        ("One. Two.", 4, 0, "One. "),
        ("One. Two.", 5, 5, "Two."),
        ("One. Two. ", 10, 5, "Two. "),
        ("One\nTwo", 3, 0, "One\n"),
        ("One\nTwo", 4, 4, "Two"),
        ("One\n", 4, 0, "One\n"),
    ],
)
def test_a_cursor_is_in_the_sentence_around_or_behind_it(
    text: str, cursor: int, start: int, sentence: str
) -> None:
    found = sentence_at(text, cursor)
    assert (found.start, found.text) == (start, sentence)
