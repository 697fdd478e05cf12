"""The flags of early stopping: a number, or `calibrated`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from skipstone.errors import UsageError

if TYPE_CHECKING:
    from skipstone.bundle import Knob
    from skipstone.runtimes.adaptive import AdaptiveOptions

CALIBRATED = "calibrated"


def early_stopping(margin: str | None, saturation: str | None) -> AdaptiveOptions | Knob:
    """What --early-exit-margin and --encoder-saturation say; the name of a flag that is `calibrated`, for `look_up`.

    Raises:
        UsageError: no number, one that means nothing, or a calibrated flag beside the other one.
    """
    from skipstone.runtimes.adaptive import AdaptiveOptions

    if CALIBRATED not in (margin, saturation):
        return AdaptiveOptions(
            _number("--early-exit-margin", margin), _number("--encoder-saturation", saturation)
        )
    if margin is not None and saturation is not None:
        raise UsageError(
            "--early-exit-margin, --encoder-saturation: each was calibrated without the other",
            hint="give one of them",
        )
    return "early-exit-margin" if margin == CALIBRATED else "encoder-saturation"


def look_up(stopping: AdaptiveOptions | Knob, bundle: Path) -> AdaptiveOptions:
    """What a bundle's calibration says, where one is asked for.

    Raises:
        BundleError: there is no bundle.
        UsageError: it holds no calibration of the flag.
    """
    from skipstone.bundle import read_manifest
    from skipstone.runtimes.adaptive import calibrated_options

    if not isinstance(stopping, str):
        return stopping
    return calibrated_options(bundle, read_manifest(bundle), stopping)


def _number(flag: str, text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError as error:
        raise UsageError(f"{flag} {text}: a number or '{CALIBRATED}' was expected") from error
