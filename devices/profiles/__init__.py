"""What a device is, what it accepts, and whether this machine has it.

    >>> from skipstone.devices.profiles import load_profile
    >>> load_profile("cpu").default_quantize
    'q8_0'

A profile is one TOML file in this folder; a new device is one new file.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from skipstone.errors import DeviceError

_FOLDER = Path(__file__).resolve().parent


class DeviceProfile(BaseModel):
    """A device and how far it was tried.

    Attributes:
        name: as given to `--device`; the file's name.
        title: for people.
        engine: what runs bundles there (`skipstone.runtimes.engines`).
        backend: the engine's own name for the device, as llama.cpp's registry gives it.
        formats: bundle formats it takes.
        default_quantize: scheme where the user names none.
        quantizations: schemes the device computes with, the default included.
        gpu_layers: layers to place on it; 0 keeps them on the CPU, -1 is all.
        status: `runs` (measured on the real device), `emulated`, `compiled` (builds, was not run) or
            `not run`.
        verified: what was done to be able to say so.
        notes: what a user should know.
        sources: where the facts come from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str
    engine: Literal["llamacpp"]
    backend: str
    formats: tuple[str, ...] = Field(min_length=1)
    default_quantize: str
    quantizations: tuple[str, ...] = Field(min_length=1)
    gpu_layers: int = Field(ge=-1)
    status: Literal["runs", "emulated", "compiled", "not run"]
    verified: str
    notes: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()


def profile_names() -> tuple[str, ...]:
    """Names of the known profiles, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))


def load_profile(name: str) -> DeviceProfile:
    """The profile of a device.

    Raises:
        DeviceError: no such profile; lists them.
    """
    known = profile_names()
    if name not in known:
        raise DeviceError(f"--device {name}: unknown device", hint=f"known: {', '.join(known)}")
    return read_profile(_FOLDER / f"{name}.toml")


def read_profile(path: Path) -> DeviceProfile:
    """Read and check one profile file.

    Raises:
        DeviceError: not TOML, a key that does not fit, or a name that is not the file's.
    """
    try:
        profile = DeviceProfile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DeviceError(f"{path}: {where}: {first['msg']}", hint="mend the profile") from error
    except (OSError, ValueError) as error:
        raise DeviceError(f"{path}: not a readable profile: {error}", hint="mend the profile") from error
    if profile.name != path.stem:
        raise DeviceError(f"{path}: is named {profile.name!r}", hint=f"name it {path.stem!r}")
    return profile
