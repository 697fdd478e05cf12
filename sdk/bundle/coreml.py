"""What a manifest says of a Core ML package."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from skipstone.bundle.fixed import FixedShapes, PieceEntry

PACKAGE_INTERFACE = 1  # what the functions take and compute


class FunctionEntry(PieceEntry):
    """A function of the package, by the `name` that Core ML is given to load it."""

    name: str


class PackageEntry(FixedShapes):
    """A Core ML package, the folder `package`, whose `files` are listed with the bundle's (docs/coreml.md says what its
    functions compute). Functions of one part hold the same weights, which are stored once: `stored_bytes` of them in the
    whole package. `specification` is Core ML's number for its version: 9 is iOS 18 and macOS 15. `status` says that the
    package was `compiled` and checked, not run. `interface` numbers what the functions mean.
    """

    interface: Annotated[int, Field(gt=0)] = PACKAGE_INTERFACE
    target: Literal["coreml"] = "coreml"
    status: Literal["compiled"] = "compiled"
    package: str
    files: tuple[str, ...]
    specification: Annotated[int, Field(gt=0)]
    stored_bytes: Annotated[int, Field(ge=0)]
    functions: tuple[FunctionEntry, ...]
