"""Bundles to damage, and manifests that tell the truth of the damage."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from skipstone.bundle import hash_file
from tests.sdk.cli.command import Done, skipstone


def generate(bundle: Path, *flags: str | Path) -> Done:
    """A short generation from a bundle."""
    quick = () if "--max-new-tokens" in flags else ("--max-new-tokens", "2")
    prompt = () if "--prompt" in flags else ("--prompt", "def f(")
    threads = () if "--threads" in flags else ("--threads", "1")
    return skipstone("generate", bundle, *prompt, *quick, *threads, *flags)


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a bundle's manifest."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def list_anew(bundle: Path, name: str) -> None:
    """Let the manifest agree with a changed file."""

    def change(manifest: dict[str, Any]) -> None:
        (entry,) = [entry for entry in manifest["files"] if entry["path"] == name]
        entry["size"] = (bundle / name).stat().st_size
        entry["sha256"] = hash_file(bundle / name)

    edit(bundle, change)
