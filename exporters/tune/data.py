"""Corpora for tuning: Python sources of installed packages, or the user's own text, as token arrays.

Sources are split into training and held-out parts by a hash of each file's content, so the split depends on
nothing but the files, and a copy of a held-out file elsewhere is held out too.
"""

from __future__ import annotations

import hashlib
import json
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from skipstone.errors import SkipstoneError

if TYPE_CHECKING:
    from skipstone.exporters.tune.recipe import Corpus

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
STANDARD_LIBRARY = "python-stdlib"

# Tests, vendored copies and sources that are mostly tables teach a model of code little.
_SKIPPED_FOLDERS = re.compile(
    r"tests?|testing|__pycache__|(site|dist)-packages|idlelib|lib2to3|turtledemo|ensurepip|pydoc_data|encodings"
    r"|_?vendor(ed)?"
)
_SKIPPED_FILES = re.compile(r"(conftest|test_.*|.*_test|.*_pb2|_builtins|.*_builtins)\.py")
_MAX_DIGIT_SHARE = 0.15
_MAX_LINE = 1_000


@dataclass(frozen=True)
class Source:
    """One text of a corpus: the package it comes from, its path inside it, and whether it is held out."""

    package: str
    path: str
    text: str
    digest: str
    held_out: bool


@dataclass(frozen=True)
class PackageShare:
    """What one package contributes to a corpus, with the version and licence that its metadata states."""

    package: str
    version: str
    licence: str
    files: int
    bytes: int
    held_out_files: int


@dataclass(frozen=True)
class TokenisedCorpus:
    """A corpus as token ids: `train` and `held_out` are 1-D uint16/uint32 arrays of concatenated
    documents.
    """

    train: npt.NDArray[np.unsignedinteger]
    held_out: npt.NDArray[np.unsignedinteger]
    shares: tuple[PackageShare, ...]


def collect(corpus: Corpus) -> list[Source]:
    """The recipe's sources, without duplicates, no package above `max_share` of the total bytes.

    Raises SkipstoneError when a named package is not installed or nothing is left.
    """
    groups: dict[str, list[Source]] = {}
    seen: set[str] = set()
    if corpus.standard_library:
        root = Path(sysconfig.get_paths()["stdlib"])
        groups[STANDARD_LIBRARY] = list(_sources(STANDARD_LIBRARY, _walk(root), root, corpus, seen))
    for package in corpus.packages:
        distribution = _distribution(package)
        root = Path(str(distribution.locate_file("")))
        files = sorted(root / str(f) for f in distribution.files or () if _wanted(Path(str(f))))
        groups[package] = list(_sources(package, files, root, corpus, seen))
    if not any(groups.values()):
        raise SkipstoneError(
            "the recipe's corpus is empty: it names no package and no standard library",
            hint="set corpus.packages or corpus.standard_library in the recipe, or give --data",
        )
    return _cap(groups, corpus.max_share)


def read_texts(paths: Iterable[Path], held_out_modulus: int) -> list[Source]:
    """Sources from the user's files and folders: `.jsonl` files have a "text" a line, all others are plain
    text.
    """
    sources: list[Source] = []
    for path in paths:
        if not path.exists():
            raise SkipstoneError(
                f"--data {path}: no such file or folder", hint="give existing files or folders"
            )
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            sources.extend(_source("data", str(file), text, held_out_modulus) for text in _texts(file))
    if not sources:
        raise SkipstoneError(
            "--data: no text was found there", hint="give UTF-8 text files or .jsonl with a text key"
        )
    return sources


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with GPT-2's pre-tokenizer; `<|endoftext|>` is id 0 and `<|pad|>` id 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenise(sources: list[Source], tokenizer: Tokenizer, document_start: int) -> TokenisedCorpus:
    """Token arrays of both parts, each document after one `document_start` token, documents in hash order."""
    dtype: type[np.unsignedinteger] = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    ordered = sorted(sources, key=lambda source: source.digest)
    parts: dict[bool, list[npt.NDArray[np.unsignedinteger]]] = {False: [], True: []}
    for begin in range(0, len(ordered), 256):
        batch = ordered[begin : begin + 256]
        for source, encoding in zip(batch, tokenizer.encode_batch_fast([s.text for s in batch]), strict=True):
            parts[source.held_out].append(np.array([document_start, *encoding.ids], dtype=dtype))
    if not parts[False] or not parts[True]:
        raise SkipstoneError(
            f"{len(sources)} texts leave {'no held-out' if parts[False] else 'no training'} text",
            hint="give more files, or lower corpus.held_out_modulus",
        )
    return TokenisedCorpus(np.concatenate(parts[False]), np.concatenate(parts[True]), package_shares(sources))


def package_shares(sources: Iterable[Source]) -> tuple[PackageShare, ...]:
    """Files and bytes per package, largest first, with version and licence from the installed metadata."""
    groups: dict[str, list[Source]] = {}
    for source in sources:
        groups.setdefault(source.package, []).append(source)
    shares = [
        PackageShare(
            package=package,
            version=_version(package),
            licence=_licence(package),
            files=len(group),
            bytes=sum(len(source.text.encode()) for source in group),
            held_out_files=sum(source.held_out for source in group),
        )
        for package, group in groups.items()
    ]
    return tuple(sorted(shares, key=lambda share: -share.bytes))


def save(corpus: TokenisedCorpus, folder: Path) -> None:
    """Write `train.npy`, `held_out.npy` and `corpus.json` to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "train.npy", corpus.train)
    np.save(folder / "held_out.npy", corpus.held_out)
    (folder / "corpus.json").write_text(
        json.dumps([asdict(share) for share in corpus.shares], indent=1) + "\n"
    )


def load(folder: Path) -> TokenisedCorpus:
    """Read what `save` wrote; the arrays are memory-mapped."""
    return TokenisedCorpus(
        train=np.load(folder / "train.npy", mmap_mode="r"),
        held_out=np.load(folder / "held_out.npy", mmap_mode="r"),
        shares=tuple(PackageShare(**share) for share in json.loads((folder / "corpus.json").read_text())),
    )


def _walk(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*.py") if _wanted(path.relative_to(root)))


def _wanted(path: Path) -> bool:
    return (
        path.suffix == ".py"
        and not any(map(_SKIPPED_FOLDERS.fullmatch, path.parts[:-1]))
        and not _SKIPPED_FILES.fullmatch(path.name)
    )


def _sources(
    package: str, files: Iterable[Path], root: Path, corpus: Corpus, seen: set[str]
) -> Iterator[Source]:
    for file in files:
        text = _read(file)
        if text is None or not 200 < len(text) <= corpus.max_file_bytes or _is_table(text):
            continue
        source = _source(package, file.relative_to(root).as_posix(), text, corpus.held_out_modulus)
        if source.digest not in seen:
            seen.add(source.digest)
            yield source


def _source(package: str, path: str, text: str, held_out_modulus: int) -> Source:
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Source(package, path, text, digest, held_out=int(digest, 16) % held_out_modulus == 0)


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _is_table(text: str) -> bool:
    """Whether a source is data rather than code: mostly digits, or with very long lines."""
    digits = sum(map(text.count, "0123456789"))
    return digits > _MAX_DIGIT_SHARE * len(text) or max(map(len, text.splitlines())) > _MAX_LINE


def _texts(file: Path) -> list[str]:
    text = _read(file)
    if not text:
        return []
    if file.suffix != ".jsonl":
        return [text]
    try:
        return [str(json.loads(line)["text"]) for line in text.splitlines() if line.strip()]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise SkipstoneError(
            f'--data {file}: a line is not a JSON object with a "text" key ({error})', hint="correct the file"
        ) from error


def _cap(groups: dict[str, list[Source]], max_share: float) -> list[Source]:
    """Drop files, last in hash order first, from any package above `max_share` of what remains in total."""
    sizes = {name: sum(len(s.text) for s in group) for name, group in groups.items()}
    limit = float(max(sizes.values()))
    for _ in range(
        100
    ):  # lowering the largest packages lowers the total too; this settles within a few rounds
        limit = min(limit, max_share * sum(min(size, limit) for size in sizes.values()))
    # Sizes are all below the limit only where there are enough packages to reach 1 / max_share; else keep
    # all.
    limit = limit if len(groups) * max_share > 1 else float("inf")
    kept: list[Source] = []
    for group in groups.values():
        total = 0
        for source in sorted(group, key=lambda s: s.digest):
            total += len(source.text)
            if total <= limit:
                kept.append(source)
    return kept


def _distribution(package: str) -> metadata.Distribution:
    try:
        return metadata.distribution(package)
    except metadata.PackageNotFoundError as error:
        raise SkipstoneError(
            f"corpus.packages: {package} is not installed", hint="install it, or take it out of the recipe"
        ) from error


def _version(package: str) -> str:
    if package == STANDARD_LIBRARY:
        return sysconfig.get_python_version()
    return metadata.version(package) if _is_installed(package) else ""


def _licence(package: str) -> str:
    if package == STANDARD_LIBRARY:
        return "PSF-2.0"
    if not _is_installed(package):
        return ""
    fields = metadata.metadata(package)
    stated = "".join(fields.get_all("License-Expression") or ())
    if not stated:
        classifiers = [
            c.rsplit(" :: ", 1)[-1] for c in fields.get_all("Classifier") or () if c.startswith("License")
        ]
        named = "".join(fields.get_all("License") or ()) or "see the package"
        stated = ", ".join(classifiers) or named.splitlines()[0]
    return stated


def _is_installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True
