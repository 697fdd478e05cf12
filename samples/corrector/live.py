"""Correcting while one types: a small editor that never waits for the model.

Everything but `correct` runs in the thread of prompt_toolkit's event loop; `correct` runs in the worker's, one call at
a time, since a model is not for several threads at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

from prompt_toolkit.application import Application
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.layout import BufferControl, FormattedTextControl, HSplit, Layout, Window
from prompt_toolkit.output import Output
from prompt_toolkit.styles import Style

from skipstone.sentences import split_sentences

from .diff import diff_words, follow, show

PAUSE = 0.4  # seconds without a key after which the sentence is corrected
_HELP = "Tab: take the correction over   Ctrl-D: end and print the text"
_STYLE = Style.from_dict(
    {"removed": "ansired strike", "added": "ansigreen underline", "faint": "ansibrightblack"}
)


@dataclass(frozen=True)
class Sentence:
    """A sentence and where in the text it begins."""

    start: int
    text: str


def sentence_at(text: str, cursor: int) -> Sentence:
    """The sentence that the cursor is in; the last one at the text's end."""
    start, piece = 0, ""
    for piece in split_sentences(text):
        if cursor < start + len(piece):
            return Sentence(start, piece)
        start += len(piece)
    return Sentence(start - len(piece), piece)


class Editor:
    """The editor.

    Args:
        correct: from a sentence to what it should be; called in the worker.
        worker: of one thread.
        marked: show corrections with marks, not with colours.
        output: where to draw; None: standard output.
        pause: seconds.
    """

    def __init__(
        self,
        correct: Callable[[str], str],
        worker: Executor,
        *,
        marked: bool = False,
        output: Output | None = None,
        pause: float = PAUSE,
    ) -> None:
        self._correct, self._worker, self._marked, self._pause = correct, worker, marked, pause
        self._touched = asyncio.Event()
        self._sentence = Sentence(0, "")  # what `_answer` is about
        self._answer: str | Exception | None = None
        self.buffer = Buffer(
            multiline=True, on_text_changed=self._on_change, on_cursor_position_changed=self._on_change
        )
        self.application: Application[str | None] = Application(
            layout=self._layout(),
            key_bindings=self._keys(),
            style=_STYLE,
            output=output,
            erase_when_done=True,
        )

    async def run(self) -> str | None:
        """Edit until the user ends it; returns the text, None after Ctrl-C."""
        return await self.application.run_async(pre_run=self._begin)

    def _begin(self) -> None:
        self.application.create_background_task(self._watch())

    async def _watch(self) -> None:
        """Have the sentence under the cursor corrected after every pause; an answer that comes too late is dropped."""
        while True:
            await self._touched.wait()
            await self._wait_for_pause()
            asked = self._under_cursor()
            if asked == self._sentence or not asked.text.strip():
                continue
            self._set(asked, None)
            answer = await self._ask(asked.text)
            if asked == self._under_cursor():
                self._set(asked, answer)

    async def _wait_for_pause(self) -> None:
        while self._touched.is_set():
            self._touched.clear()
            await asyncio.sleep(self._pause)

    async def _ask(self, text: str) -> str | Exception:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, self._correct, text)
        except Exception as error:  # shown below the text, which is worth more than a correction
            return error

    def _on_change(self, _buffer: Buffer) -> None:
        self._touched.set()
        if self._under_cursor() != self._sentence:
            self._set(Sentence(0, ""), None)

    def _set(self, sentence: Sentence, answer: str | Exception | None) -> None:
        self._sentence, self._answer = sentence, answer
        self.application.invalidate()

    def _under_cursor(self) -> Sentence:
        return sentence_at(self.buffer.text, self.buffer.cursor_position)

    def _take_over(self) -> None:
        """Put the correction that is shown into the text; undo takes it back, as it does whatever a key did."""
        if not isinstance(self._answer, str):
            return
        start, before, after = self._sentence.start, self._sentence.text, self._answer
        cursor = start + follow(diff_words(before, after), self.buffer.cursor_position - start)
        text = self.buffer.text
        self.buffer.document = Document(text[:start] + after + text[start + len(before) :], cursor)

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()

        @keys.add("tab")
        def _(_event: KeyPressEvent) -> None:
            self._take_over()

        @keys.add("c-d")
        def _(event: KeyPressEvent) -> None:
            event.app.exit(result=self.buffer.text)

        @keys.add("c-c")
        def _(event: KeyPressEvent) -> None:
            event.app.exit(result=None)

        return keys

    def _layout(self) -> Layout:
        text = Window(BufferControl(self.buffer), wrap_lines=True, dont_extend_height=True)
        correction = Window(FormattedTextControl(self.correction), wrap_lines=True, dont_extend_height=True)
        help_line = Window(FormattedTextControl([("class:faint", _HELP)]), height=1)
        return Layout(HSplit([text, correction, help_line]), focused_element=text)

    def correction(self) -> StyleAndTextTuples:
        """The line below the text."""
        before, answer = self._sentence.text, self._answer
        if isinstance(answer, Exception):
            return [("class:removed", f"no correction: {answer}")]
        if answer is None:
            return [("class:faint", "…" if before else "")]
        if answer == before:
            return [("class:faint", "no correction")]
        return [
            (f"class:{kind}", text) for kind, text in show(diff_words(before, answer), marked=self._marked)
        ]
