"""A bundle's folder: opening and checking one, and writing one so that nothing is left half done."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from skipstone.bundle.calibration import Calibration
from skipstone.bundle.manifest import (
    MANIFEST,
    MANIFEST_NAME,
    SCHEMA_VERSION,
    FileEntry,
    Manifest,
    ManifestBase,
)
from skipstone.errors import BundleError

_HASH_BLOCK = 1 << 20
_Manifest = TypeVar("_Manifest", bound=ManifestBase)


class Bundle:
    """An opened and checked bundle.

    Attributes:
        path: the folder.
        manifest: its manifest.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    def file(self, name: str) -> Path:
        """Absolute path of one of the bundle's listed files."""
        return self.path / name

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r}, {self.manifest.model.name}, exits={self.manifest.exits})"


def manifest_of(bundle: Bundle, kind: type[_Manifest]) -> _Manifest:
    """A bundle's manifest as that of one format, say `manifest_of(bundle, OnnxManifest)`.

    Raises:
        BundleError: it is of another format.
    """
    if not isinstance(bundle.manifest, kind):
        wanted = kind.model_fields["format"].default
        raise BundleError(
            f"{bundle.path}: a bundle of format {bundle.manifest.format}, {wanted} was expected",
            hint=f"export it with --format {wanted}",
        )
    return bundle.manifest


def open_bundle(path: str | os.PathLike[str], *, verify_hashes: bool = True) -> Bundle:
    """Open a bundle and check it: schema version, schema, paths inside the folder, sizes and hashes.

    Args:
        path: the folder written by `skipstone export`.
        verify_hashes: False skips the hashes (sizes are always checked).

    Raises:
        BundleError: naming the file that is missing, truncated or altered, or the key that does not fit.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    for entry in manifest.files:
        _check_file(folder, entry, verify_hash=verify_hashes)
    return Bundle(folder.resolve(), manifest)


def read_manifest(folder: Path) -> Manifest:
    """Read and validate manifest.json alone.

    Raises:
        BundleError: no folder, no manifest, not JSON, an unknown schema version or a key that does not fit.
    """
    if not folder.exists():
        raise BundleError(f"{folder}: no such folder", hint="pass a folder written by `skipstone export`")
    source = folder / MANIFEST_NAME
    if not folder.is_dir() or not source.is_file():
        raise BundleError(
            f"{folder}: not a bundle, {MANIFEST_NAME} not found",
            hint="make one with `skipstone export CHECKPOINT`",
        )
    try:
        raw = json.loads(source.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, OSError) as error:
        raise BundleError(
            f"{source}: not readable as JSON: {error}", hint="export the bundle again"
        ) from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{source}: schema version {version!r}, this Skipstone reads {SCHEMA_VERSION}",
            hint="upgrade Skipstone, or export the bundle again with this version",
        )
    try:
        return MANIFEST.validate_json(source.read_bytes(), strict=False)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise BundleError(f"{source}: {where}: {first['msg']}", hint="export the bundle again") from error


def hash_file(path: Path) -> str:
    """sha256 of a file, in hex, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def describe_file(folder: Path, name: str) -> FileEntry:
    """FileEntry (size, hash) of a file just written into `folder`."""
    target = folder / name
    return FileEntry(path=name, size=target.stat().st_size, sha256=hash_file(target))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json into `folder`, through a temporary file."""
    target = folder / MANIFEST_NAME
    draft = folder / (MANIFEST_NAME + ".part")
    try:
        draft.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        draft.replace(target)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def store_calibration(folder: Path, calibration: Calibration) -> None:
    """Keep a calibration in a bundle's manifest, in place of an earlier one of the same knob.

    Raises:
        BundleError: there is no bundle, or its manifest cannot be written; it is as it was then.
    """
    manifest = read_manifest(folder)
    others = (kept for kept in manifest.calibrations if kept.knob != calibration.knob)
    try:
        write_manifest(folder, manifest.model_copy(update={"calibrations": (*others, calibration)}))
    except OSError as error:
        raise BundleError(
            f"{folder / MANIFEST_NAME}: cannot be written: {error}",
            hint="free space, or copy the bundle to a folder of your own",
        ) from error


@contextmanager
def bundle_in_progress(
    output: Path, *, overwrite: bool = False, marker: str = MANIFEST_NAME, what: str = "bundle"
) -> Iterator[Path]:
    """A temporary folder beside `output` that becomes `output` when the block ends well, and vanishes otherwise.

    Args:
        output: the folder to make.
        overwrite: whether one of the same kind may be replaced.
        marker: the file by which one is known.
        what: it is called in messages.

    Raises:
        BundleError: `output` exists and is not an (overwritable) bundle, or the disk refuses (no space, no permission).
    """
    if output.exists() and not (
        output.is_dir() and (not any(output.iterdir()) or (output / marker).is_file())
    ):
        raise BundleError(f"{output}: exists and is not a {what}", hint="choose another --output folder")
    if (output / marker).is_file() and not overwrite:
        raise BundleError(f"{output}: already holds a {what}", hint="pass --overwrite to replace it")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise BundleError(
            f"{output}: cannot be written: {error}", hint="choose another --output folder"
        ) from error
    try:
        yield draft
        draft.chmod(0o755)
        _swap(draft, output)
    except OSError as error:
        raise BundleError(
            f"{output}: writing failed: {error}",
            hint="free space or choose another --output folder; nothing was kept",
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _swap(draft: Path, output: Path) -> None:
    """Put `draft` in `output`'s place, keeping the old folder until the new one stands."""
    if not output.exists():
        draft.rename(output)
        return
    old = draft.with_name(draft.name + ".old")
    output.rename(old)
    try:
        draft.rename(output)
    except OSError:
        old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _check_file(folder: Path, entry: FileEntry, *, verify_hash: bool) -> None:
    target = folder / entry.path
    if not target.is_file():
        raise BundleError(f"{target}: missing from the bundle", hint="export or copy the bundle again")
    if not target.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{target}: points outside the bundle", hint="export or copy the bundle again")
    size = target.stat().st_size
    if size != entry.size:
        raise BundleError(
            f"{target}: {size} bytes, the manifest says {entry.size}",
            hint="the file is truncated; copy it again",
        )
    if verify_hash and hash_file(target) != entry.sha256:
        raise BundleError(
            f"{target}: its sha256 differs from the manifest's", hint="the file was altered; export again"
        )
