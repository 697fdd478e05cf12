"""Errors that say what was found, what was expected and what to do next.

    >>> from skipstone.errors import SkipstoneError
    >>> raise SkipstoneError("out/: no manifest.json found", hint="pass a folder made by `skipstone export`")
    Traceback (most recent call last):
    ...
    skipstone.errors.SkipstoneError: out/: no manifest.json found (pass a folder made by `skipstone export`)

Everything Skipstone raises on purpose is a `SkipstoneError`; the CLI prints it on one line and exits with code 2.
"""


class SkipstoneError(Exception):
    """Root of all errors raised on purpose.

    Args:
        message: the file or flag concerned, the value found and what was expected.
        hint: the next step for the user.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(SkipstoneError):
    """A flag or argument has a value that cannot work."""


class BundleError(SkipstoneError):
    """A bundle is missing, incomplete, altered or of an unknown schema."""


class CheckpointError(SkipstoneError):
    """A checkpoint is missing, unreadable or of an architecture that cannot be exported."""


class ExportError(SkipstoneError):
    """An export failed or its self-test found the artefact out of tolerance."""


class EngineError(SkipstoneError):
    """The engine below (llama.cpp, torch, …) refused to load or to compute."""


class ContextFullError(SkipstoneError):
    """More positions were asked for than the session's context holds."""


class VocabularyMismatchError(SkipstoneError):
    """A draft model does not share the target's vocabulary."""


class DeviceError(SkipstoneError):
    """A device is unknown or cannot be used here."""
