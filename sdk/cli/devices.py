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
    """A line each in the table, and below it what does not fit into one."""
    from rich.console import Console
    from rich.table import Table

    table = Table("device", "format", "default quantize", "was tried", "here")
    for column in table.columns:
        column.no_wrap = True
    for entry in found:
        table.add_row(
            f"[bold]{entry.profile.name}[/bold]",
            entry.format,
            entry.support.default_quantize,
            entry.support.status,
            "[green]yes[/green]" if entry.here.usable else "no",
        )
    console = Console()
    console.print(table)
    for title, usable in (("Here", True), ("Not here", False)):
        console.print(f"\n[bold]{title}[/bold]")
        for entry in found:
            if entry.here.usable == usable:
                reason = f"{_name(entry)}: {entry.here.reason}"
                console.print(reason, highlight=False, soft_wrap=True)
    console.print("\n[bold]How each was tried[/bold]")
    for entry in found:
        also = ", ".join(entry.support.quantizations[1:])
        console.print(
            f"{_name(entry)} ({entry.profile.title}): {entry.support.status}. {entry.support.verified}"
            + (f" Also takes {also}." if also else ""),
            highlight=False,
            soft_wrap=True,
        )


def _name(entry: _Found) -> str:
    return f"[bold]{entry.profile.name}, {entry.format}[/bold]"
