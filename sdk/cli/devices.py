"""`skipstone devices`: the known devices, and which of them this machine has."""

from __future__ import annotations

import json as json_
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from skipstone.devices.detection import Availability
    from skipstone.devices.profiles import DeviceProfile, FormatSupport


def devices(
    json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """List device profiles and say which can be used here, and why not."""
    from skipstone.devices.detection import detect

    found = [
        _Found(profile, name, detect(profile, name)) for profile in _profiles() for name in profile.formats
    ]
    if json:
        typer.echo(json_.dumps([_record(entry) for entry in found], indent=2, ensure_ascii=False))
    else:
        _show(found)


@dataclass(frozen=True)
class _Found:
    """A device with one of its formats, and whether it is here."""

    profile: DeviceProfile
    format: str
    here: Availability

    @property
    def support(self) -> FormatSupport:
        return self.profile.formats[self.format]


def _profiles() -> list[DeviceProfile]:
    from skipstone.devices.profiles import load_profile, profile_names

    return [load_profile(name) for name in profile_names()]


def _record(found: _Found) -> dict[str, object]:
    return {
        **found.profile.model_dump(mode="json", exclude={"formats"}),
        "format": found.format,
        **found.support.model_dump(mode="json"),
        "usable": found.here.usable,
        "reason": found.here.reason,
    }


def _show(found: list[_Found]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("device", "", "format", "quantize (default first)", "was tried", "here")
    for index in (0, 2):
        table.columns[index].no_wrap = True
    for entry in found:
        table.add_row(
            f"[bold]{entry.profile.name}[/bold]",
            entry.profile.title,
            entry.format,
            ", ".join(entry.support.quantizations),
            entry.support.status,
            f"[green]yes[/green]: {entry.here.reason}" if entry.here.usable else f"no: {entry.here.reason}",
        )
    console = Console()
    console.print(table)
    for entry in found:
        name = f"[bold]{entry.profile.name}, {entry.format}[/bold]"
        console.print(f"{name}: {entry.support.verified}", highlight=False, soft_wrap=True)
