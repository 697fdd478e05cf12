"""Lays the four source folders out under build/typed as the one package they install as, by links.

    python tools/link_packages.py

Type checkers and editors cannot follow the `package-dir` mapping of an editable install; they can follow a
folder shaped like the package. Every run brings it up to date, new and removed files included. Standard
library only.
"""

import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def package_folders(root: Path) -> dict[str, Path]:
    """Import name → source folder, as pyproject.toml's `package-dir` maps them."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    folders: dict[str, str] = project["tool"]["setuptools"]["package-dir"]
    return {name: root / folder for name, folder in folders.items()}


def link_packages(folders: Mapping[str, Path], into: Path) -> None:
    """Brings `into` up to date: every entry of every folder linked where an installed package has it."""
    wanted = {
        into.joinpath(*name.split("."), entry.name): entry
        for name, folder in folders.items()
        for entry in folder.iterdir()
        if entry.name != "__pycache__"
    }
    for link in {path for path in into.rglob("*") if path.is_symlink()}:
        if wanted.get(link) != link.readlink():
            link.unlink()
    for link, entry in wanted.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(entry)


def main() -> int:
    """Entry point; returns the exit status."""
    link_packages(package_folders(ROOT), ROOT / "build" / "typed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
