"""The checkpoint as transformers computes it, in float32: what every artefact is compared with.

>>> reference = EagerReference(Path("samples/models/coder"))
>>> reference.logits([1, 2, 3]).shape
(3, 4096)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from skipstone.exporters.checkpoint import load_eager

if TYPE_CHECKING:
    import torch

FloatArray = NDArray[np.float32]


class EagerReference:
    """A decoder, or an encoder-decoder with the source that the decoder attends to.

    Args:
        checkpoint: its folder.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._model: Any = load_eager(checkpoint)

    def logits(
        self, tokens: Sequence[int], source: Sequence[int] = (), encoder_layers: int | None = None
    ) -> FloatArray:
        """Logits [n, vocab_size] after every token of a fresh text.

        Args:
            tokens: the decoder's.
            source: the encoder's; empty for a decoder alone.
            encoder_layers: run only so many of the encoder's layers before its final norm; None: all.
        """
        import torch

        ids = torch.tensor([list(tokens)])
        if not source:
            logits = self._model(ids).logits[0]
        else:
            states = self._encode(source, encoder_layers)
            logits = self._model(encoder_outputs=(states,), decoder_input_ids=ids).logits[0]
        return np.asarray(logits.numpy(), np.float32)

    def _encode(self, source: Sequence[int], layers: int | None) -> torch.Tensor:
        """The encoder's output [1, n, hidden_size], final norm included."""
        import torch

        encoder = self._model.encoder
        every = encoder.block
        encoder.block = every[:layers]
        try:
            states: torch.Tensor = encoder(torch.tensor([list(source)])).last_hidden_state
        finally:
            encoder.block = every
        return states
