"""Inputs into a process of its own and timed generations out of it, one JSON line each.

The systems compared may need different environments, and disturb each other's threads where they share a process: this
module is imported in all of them and uses the standard library alone.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Request:
    """What to generate from: token ids of a prompt, and of an encoder-decoder's source.

    Attributes:
        row: which of its ways to generate the system takes.
        max_new_tokens: at most so many.
        fresh: whether what was learned in earlier requests of this row is to be forgotten.
    """

    row: str
    prompt: tuple[int, ...]
    source: tuple[int, ...]
    max_new_tokens: int
    fresh: bool = False


@dataclass(frozen=True)
class Answer:
    """A greedy generation: its tokens, seconds to the first one (prefill included), and from there to the last.

    Attributes:
        rounds: calls of the whole model after the first token; 0: not known.
    """

    tokens: tuple[int, ...]
    first_seconds: float
    decode_seconds: float
    rounds: int = 0


Generate = Callable[[Request], Answer]


def serve(start: Callable[[], tuple[Generate, dict[str, str]]]) -> None:
    """Answer requests from standard input until it ends.

    Args:
        start: loads the model; returns what generates, and what is worth recording. Whatever it or its libraries print
            goes to standard error.
    """
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        os.dup2(2, 1)
        generate, about = start()
        print(json.dumps(about), file=channel, flush=True)
        for line in sys.stdin:
            print(json.dumps(asdict(generate(_request(line)))), file=channel, flush=True)


def _request(line: str) -> Request:
    told = json.loads(line)
    return Request(**{**told, "prompt": tuple(told["prompt"]), "source": tuple(told["source"])})


class Worker:
    """A process that `serve`s; a context manager.

    Args:
        python: of its environment.
        module: what it runs, from the root of the project.
        arguments: of the module.
        environment: variables it gets beside ours.

    Attributes:
        about: what the process told of itself.
    """

    def __init__(
        self, python: Path, module: str, *arguments: str | Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self._module = module
        self._log: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 — closed below
        self._process = subprocess.Popen(
            [python, "-m", module, *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.about: dict[str, str] = self._read()

    def __call__(self, request: Request) -> Answer:
        """Generate."""
        if self._process.stdin is None:
            raise AssertionError("its input is a pipe")
        self._process.stdin.write(json.dumps(asdict(request)) + "\n")
        self._process.stdin.flush()
        told = self._read()
        return Answer(**{**told, "tokens": tuple(told["tokens"])})

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_error: object) -> None:
        self._process.communicate()  # closes its input, on which it ends
        self._log.close()

    def _read(self) -> dict:
        if self._process.stdout is None:
            raise AssertionError("its output is a pipe")
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._log.seek(0)
            raise RuntimeError(f"{self._module} ended with {status}:\n{self._log.read()[-2000:]}")
        return json.loads(line)
