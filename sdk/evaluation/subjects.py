"""What is evaluated: a bundle that this machine can run, or a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from skipstone.bundle import MANIFEST_NAME, Compression, ModelFacts, open_bundle
from skipstone.errors import BundleError, UsageError, VocabularyMismatchError

if TYPE_CHECKING:
    from skipstone.exporters.checkpoint import Checkpoint

CHECKPOINT = "checkpoint"  # in place of a format
_LONGEST = 512


@dataclass(frozen=True)
class Subject:
    """A bundle or a checkpoint.

    Attributes:
        given: what the user named it by.
        path: its folder.
        format: the bundle's, or `checkpoint`.
        quantization: the scheme; of a checkpoint the type that its weights are stored in.
        facts: of the model.
        exits: inner exits, of an encoder-decoder the decoder's.
        bytes: on disk: a bundle's files; a checkpoint's weights, configuration and tokenizer.
        longest: tokens that it takes at once, at most 512.
        sha256: of the checkpoint that it is or was made from; None: not known.
        compression: what that checkpoint had gone through.
        tokenizer: its tokenizer.
    """

    given: str
    path: Path
    format: str
    quantization: str
    facts: ModelFacts
    exits: tuple[int, ...]
    bytes: int
    longest: int
    sha256: str | None
    compression: Compression | None
    tokenizer: Tokenizer

    @property
    def is_bundle(self) -> bool:
        """Whether an engine runs it, and its speed can be measured."""
        return self.format != CHECKPOINT

    def dense_exits(self, dense: Subject) -> tuple[int | None, ...]:
        """For each exit the dense model's exit at the same place, as `Compression.kept` has it; None where that is not
        known. Without a record, models of the same depth have their exits in the same places.
        """
        record, layers = self.compression, self.facts.num_layers
        kept: tuple[int, ...] | None = None
        if record is not None and record.source_sha256 == dense.sha256:
            kept = record.kept.get("decoder")
        if kept is None and layers == dense.facts.num_layers:
            kept = tuple(range(layers))
        return tuple(None if kept is None else kept[exit_layer - 1] + 1 for exit_layer in self.exits)


def find_subject(given: str) -> Subject:
    """A bundle's folder, a checkpoint's folder or a hub name, opened and checked.

    Raises:
        BundleError: a bundle that is damaged, or a folder that is neither.
        CheckpointError: a checkpoint that cannot be read.
        UsageError: a .gguf file, or a bundle that this machine cannot run.
    """
    folder = Path(given)
    if (folder / MANIFEST_NAME).is_file():
        return _bundle(given, folder)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise BundleError(
            f"{given}: neither a bundle ({MANIFEST_NAME}) nor a checkpoint (config.json)",
            hint="pass a folder made by `skipstone export`, or a Hugging Face checkpoint",
        )
    if given.endswith(".gguf"):
        raise UsageError(f"{given}: a .gguf file is no bundle", hint="export it first: skipstone export")
    return find_checkpoint(given)


def find_checkpoint(given: str) -> Subject:
    """A checkpoint's folder or a hub name.

    Raises:
        CheckpointError: there is none, or it cannot be read.
        UsageError: the packages that read it are not installed.
    """
    try:
        from skipstone.exporters.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(given)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{given}: a checkpoint needs {error.name}, which is not installed",
            hint="pip install 'skipstone[export]', or pass bundles and leave --against out",
        ) from error
    return _checkpoint(given, checkpoint)


def check_kv_type(subject: Subject, kv_type: str | None) -> None:
    """Refuse a type of K and V that a subject's engine does not keep.

    Args:
        subject: what is to be evaluated.
        kv_type: the user's; None is every engine's usual one.

    Raises:
        UsageError: no such type, not for such a model, or not on llama.cpp.
    """
    from skipstone.runtimes.engines.llamacpp.kv_types import chosen_kv_type

    if kv_type is None:
        return
    if subject.format != "gguf":
        raise UsageError(
            f"--kv-type {kv_type}: {subject.given} is of format {subject.format}; only GGUF bundles have the choice",
            hint="evaluate it without, or leave it out",
        )
    chosen_kv_type(kv_type, subject.quantization, encodes=subject.facts.encoder is not None)


def check_alike(subject: Subject, other: Subject) -> None:
    """Refuse models whose logits cannot be compared.

    Raises:
        VocabularyMismatchError: their tokens differ.
        UsageError: one is an encoder-decoder, the other is not.
    """
    if (subject.facts.encoder is None) != (other.facts.encoder is None):
        raise UsageError(
            f"{subject.given} and {other.given}: one is an encoder-decoder, the other a decoder alone",
            hint="evaluate them apart",
        )
    ours, theirs = subject.facts.vocab_size, other.facts.vocab_size
    if ours != theirs:
        raise VocabularyMismatchError(
            f"{subject.given}: a vocabulary of {ours} tokens, {other.given} has {theirs}",
            hint="evaluate models of one vocabulary together",
        )
    vocabulary, others = (one.tokenizer.get_vocab(with_added_tokens=True) for one in (subject, other))
    differing = sorted(token for token, index in vocabulary.items() if others.get(token) != index)
    if differing or len(vocabulary) != len(others):
        named = f"token {differing[0]!r} is another" if differing else "there are fewer tokens"
        raise VocabularyMismatchError(
            f"{subject.given}: not the vocabulary of {other.given}: {named}",
            hint="evaluate models of one vocabulary together",
        )


def _bundle(given: str, folder: Path) -> Subject:
    from skipstone.exporters.quality import longest_window

    manifest = open_bundle(folder).manifest
    if manifest.parity is None:
        raise UsageError(
            f"{given}: made for {manifest.device}, which this machine cannot run",
            hint="export the same scheme with --device cpu to evaluate it",
        )
    return Subject(
        given=given,
        path=folder,
        format=manifest.format,
        quantization=manifest.quantization.scheme,
        facts=manifest.model,
        exits=manifest.exits,
        bytes=sum(entry.size for entry in manifest.files),
        longest=longest_window(manifest),
        sha256=manifest.provenance.source_sha256,
        compression=manifest.compression,
        tokenizer=Tokenizer.from_file(str(folder / manifest.tokenizer)),
    )


def _checkpoint(given: str, checkpoint: Checkpoint) -> Subject:
    from skipstone.exporters import facts as read
    from skipstone.exporters.compress.record import read_record
    from skipstone.exporters.exits import choose_exits, recorded_exits

    config, tokenizer = checkpoint.config, read.load_tokenizer(checkpoint)
    encoder = read.encoder_facts(checkpoint, None, None)
    longest = _LONGEST if encoder is not None else read.planned_context(config, None, _LONGEST, 1)
    facts = read.checkpoint_facts(checkpoint, tokenizer, longest, read.num_weights(checkpoint), encoder)
    recorded = recorded_exits(checkpoint.path, config)
    own = (checkpoint.path / name for name in ("config.json", read.TOKENIZER_FILE))
    files = {*checkpoint.tensor_files.values(), *own}
    return Subject(
        given=given,
        path=checkpoint.path,
        format=CHECKPOINT,
        quantization=str(config.dtype).removeprefix("torch."),
        facts=facts,
        exits=choose_exits(None, recorded, facts.num_layers),
        bytes=sum(file.stat().st_size for file in files),
        longest=longest,
        sha256=read.hash_checkpoint(checkpoint),
        compression=read_record(checkpoint.path),
        tokenizer=tokenizer,
    )
