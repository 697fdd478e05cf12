"""`skipstone devices`: the known devices, and which of them this machine has."""

from __future__ import annotations

import json as json_
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from skipstone.devices.detection import Availability
    from skipstone.devices.profiles import DeviceProfile


def devices(
    json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """List device profiles and say which can be used here, and why not."""
    from skipstone.devices.detection import detect
    from skipstone.devices.profiles import load_profile, profile_names

    found = [(profile, detect(profile)) for profile in map(load_profile, profile_names())]
    if json:
        typer.echo(json_.dumps([_record(*pair) for pair in found], indent=2, ensure_ascii=False))
    else:
        _show(found)


def _record(profile: DeviceProfile, here: Availability) -> dict[str, object]:
    return profile.model_dump(mode="json") | {"usable": here.usable, "reason": here.reason}


def _show(found: list[tuple[DeviceProfile, Availability]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("device", "", "formats", "quantize (default first)", "was tried", "here")
    for profile, here in found:
        others = [scheme for scheme in profile.quantizations if scheme != profile.default_quantize]
        table.add_row(
            f"[bold]{profile.name}[/bold]",
            profile.title,
            ", ".join(profile.formats),
            ", ".join((profile.default_quantize, *others)),
            profile.status,
            f"[green]yes[/green]: {here.reason}" if here.usable else f"no: {here.reason}",
        )
    console = Console()
    console.print(table)
    for profile, _ in found:
        console.print(f"[bold]{profile.name}[/bold]: {profile.verified}", highlight=False)
