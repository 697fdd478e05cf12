"""What a device is, what it accepts, and whether this machine has it.

    >>> from skipstone.devices.profiles import load_profile
    >>> load_profile("cpu").formats["gguf"].default_quantize
    'q8_0'

A profile is one TOML file in this folder; a new device is one new file.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from skipstone.errors import DeviceError, UsageError

_FOLDER = Path(__file__).resolve().parent


class FormatSupport(BaseModel):
    """How a device runs the bundles of one format, and how far that was tried.

    Attributes:
        engine: what runs them (`skipstone.runtimes.engines`).
        backend: the engine's own name for the device: as llama.cpp's registry gives it, or the target that an
            ExecuTorch program is lowered to or ONNX graphs are made for.
        quantizations: schemes the device computes with; the first one where the user names none.
        gpu_layers: llama.cpp: layers to place on it; 0 keeps them on the CPU, -1 is all.
        status: `runs` (measured on the real device), `emulated`, `estimated` (compiled, and its time foretold by the
            maker's tools), `compiled` (builds, was not run) or `not run`.
        verified: what was done to be able to say so.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: Literal["llamacpp", "executorch", "onnxruntime", "coreml", "ethosu"]
    backend: str
    quantizations: tuple[str, ...] = Field(min_length=1)
    gpu_layers: int = Field(default=0, ge=-1)
    status: Literal["runs", "emulated", "estimated", "compiled", "not run"]
    verified: str

    @property
    def default_quantize(self) -> str:
        """Scheme where the user names none."""
        return self.quantizations[0]


class DeviceProfile(BaseModel):
    """A device.

    Attributes:
        name: as given to `--device`; the file's name.
        title: for people.
        systems: operating systems that have it, as Python's `platform.system()` names them; empty: any.
        formats: bundle formats it takes; the first one where the user names none.
        notes: what a user should know.
        sources: where the facts come from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str
    systems: tuple[str, ...] = ()
    formats: dict[str, FormatSupport] = Field(min_length=1)
    notes: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    def choose_format(self, name: str | None) -> str:
        """The named format, or the first one.

        Raises:
            UsageError: the device does not take it; lists what it takes.
        """
        if name is None:
            return next(iter(self.formats))
        if name not in self.formats:
            raise UsageError(
                f"--format {name}: --device {self.name} takes {', '.join(self.formats)}",
                hint="leave --format out, or choose another device: `skipstone devices` lists them",
            )
        return name


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
