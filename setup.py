"""Finds every package under the four source folders; all other settings stand in pyproject.toml."""

import tomllib
from pathlib import Path

from setuptools import find_packages, setup

project = tomllib.loads((Path(__file__).parent / "pyproject.toml").read_text(encoding="utf-8"))
roots: dict[str, str] = project["tool"]["setuptools"]["package-dir"]

setup(
    packages=[
        name
        for package, folder in roots.items()
        for name in (package, *(f"{package}.{found}" for found in find_packages(folder)))
    ]
)
