"""What a program's methods take and give, compared with the manifest before anything is called.

ExecuTorch knows the largest shape of every input and output. A manifest that means another program would otherwise show
late: as a failed call, as K and V written past their buffer, or as logits read under the wrong token ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipstone.bundle import EncoderFacts, ExecuTorchManifest
from skipstone.errors import BundleError

_INT64, _FLOAT32 = 4, 6  # ExecuTorch's numbers of the types
_NAMES = {_INT64: "int64", _FLOAT32: "float32"}


@dataclass(frozen=True)
class Array:
    """A tensor's type and its largest shape."""

    dtype: int
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{_NAMES.get(self.dtype, f'type {self.dtype}')} {list(self.shape)}"


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of a method."""

    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]

    @property
    def widest(self) -> int:
        """Most rows the first input takes, [1, n, …] or [n]; 0 without inputs."""
        return self.inputs[0].shape[:2][-1] if self.inputs and self.inputs[0].shape else 0

    def __str__(self) -> str:
        given, made = (", ".join(map(str, arrays)) or "nothing" for arrays in (self.inputs, self.outputs))
        return f"{given} → {made}"


def signature_of(metadata: Any) -> Signature:
    """The signature that ExecuTorch states for a loaded method."""
    inputs = (metadata.input_tensor_meta(index) for index in range(metadata.num_inputs()))
    outputs = (metadata.output_tensor_meta(index) for index in range(metadata.num_outputs()))
    return Signature(*(tuple(Array(t.dtype(), tuple(t.sizes())) for t in ts) for ts in (inputs, outputs)))


def expected_signatures(manifest: ExecuTorchManifest, draft_rows: int) -> dict[str, Signature]:
    """The signatures a manifest stands for; docs/executorch.md says what each method computes.

    Args:
        manifest: of the bundle.
        draft_rows: tokens in its draft vocabulary, 0 without one.
    """
    width, encoder = manifest.program.max_width, manifest.model.encoder
    hidden = Array(_FLOAT32, (1, width, manifest.model.hidden_size))
    row, rows = Array(_INT64, (width,)), Array(_INT64, (1, width))
    segment = _decoder_segment(manifest) if encoder is None else _source_segment(manifest, encoder)
    found = {
        "embed": Signature((rows,), (hidden,)),
        **{f"segment_{index}": segment for index in range(len(manifest.exits) + 1)},
        "head": Signature((hidden,), (Array(_FLOAT32, (1, width, manifest.model.vocab_size)),)),
        "compact": Signature((row, rows), (row,)),
    }
    if draft_rows:
        found["draft_head"] = Signature((hidden,), (Array(_FLOAT32, (1, width, draft_rows)),))
    if encoder is not None:
        found |= _encoder(encoder, width, manifest.model.hidden_size)
    return found


def _decoder_segment(manifest: ExecuTorchManifest) -> Signature:
    width, slots = manifest.program.max_width, manifest.program.slots
    hidden, rows = Array(_FLOAT32, (1, width, manifest.model.hidden_size)), Array(_INT64, (1, width))
    one = Array(_INT64, (1,))
    return Signature((hidden, rows, rows, one, Array(_FLOAT32, (width, slots)), one), (hidden,))


def _source_segment(manifest: ExecuTorchManifest, encoder: EncoderFacts) -> Signature:
    """Of an encoder-decoder's decoder."""
    width, slots = manifest.program.max_width, manifest.program.slots
    hidden, rows = Array(_FLOAT32, (1, width, manifest.model.hidden_size)), Array(_INT64, (1, width))
    distances, source = Array(_INT64, (width, slots)), Array(_INT64, (encoder.max_source_length,))
    return Signature((hidden, rows, distances, source), (hidden,))


def _encoder(encoder: EncoderFacts, width: int, hidden_size: int) -> dict[str, Signature]:
    """What an encoder-decoder has beside a decoder's methods, and the embedding, which serves sources too."""
    source = Array(_FLOAT32, (1, encoder.max_source_length, hidden_size))
    longest = max(width, encoder.max_source_length)
    tokens, embedded = Array(_INT64, (1, longest)), Array(_FLOAT32, (1, longest, hidden_size))
    return {
        "embed": Signature((tokens,), (embedded,)),
        **{f"encoder_{index}": Signature((source,), (source,)) for index in range(len(encoder.exits) + 1)},
        "cross": Signature((source,), (Array(_INT64, (1,)),)),
    }


def check_signatures(path: Path, found: Mapping[str, Signature], expected: Mapping[str, Signature]) -> None:
    """Compare the signatures of a program's loaded methods with the manifest's.

    Raises:
        BundleError: naming the first method that differs.
    """
    for name, wanted in expected.items():
        if name in found and found[name] != wanted:
            raise BundleError(
                f"{path}: {name} computes {found[name]}, by the manifest it were {wanted}",
                hint="program and manifest belong to different bundles; export or copy the bundle again",
            )
