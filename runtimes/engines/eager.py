"""The reference engine: a Hugging Face checkpoint in torch, float32, layer by layer as transformers wrote it.

Slow and plain on purpose; every other engine is compared with it. Torch is imported when an engine is made.

    >>> engine = EagerEngine.from_checkpoint("samples/models/coder", exits=(2, 4))
    >>> session = Session(engine, context_length=256)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstone.bundle import EncoderFacts
from skipstone.errors import EngineError
from skipstone.runtimes.engines.eager_parts import SlotCache, layer_edges, load_float32, to_numpy, to_torch
from skipstone.runtimes.rows import RowTree

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]


class EagerEngine:
    """See `skipstone.runtimes.engines.base.Engine`.

    Args:
        model: a decoder of transformers with its head, in float32 and with eager attention.
        exits: inner exits, ascending; the number of layers is added.
        draft_vocabulary: token ids that the draft head gives logits for; None: all.

    Raises:
        UsageError: exits that are not ascending numbers of layers below the last.
        EngineError: a model whose parts are not where a plain decoder has them.
    """

    encoder: EncoderFacts | None = None

    def __init__(
        self, model: Any, exits: Sequence[int] = (), draft_vocabulary: IntArray | None = None
    ) -> None:
        decoder: Any = getattr(model, "model", None)
        parts = ("layers", "norm", "embed_tokens", "rotary_emb")
        if not all(hasattr(decoder, part) for part in parts) or not hasattr(model, "lm_head"):
            raise EngineError(
                f"{type(model).__name__} is not built as a plain decoder ({', '.join(parts)}, lm_head)"
            )
        config = model.config
        self.model, self.decoder = model, decoder
        self.exits: tuple[int, ...] = layer_edges(exits, len(decoder.layers))
        self.hidden_size, self.vocab_size = int(config.hidden_size), int(config.vocab_size)
        window = (
            getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        )
        self.max_context_length = min(
            config.max_position_embeddings, window or config.max_position_embeddings
        )
        ids = np.arange(self.vocab_size) if draft_vocabulary is None else draft_vocabulary
        self.draft_vocabulary: IntArray | None = np.asarray(ids, np.int32) if exits else None

    @classmethod
    def from_checkpoint(
        cls, path: str | os.PathLike[str], exits: Sequence[int] = (), draft_vocabulary: IntArray | None = None
    ) -> EagerEngine:
        """Load a checkpoint folder in float32.

        Raises:
            CheckpointError: the folder holds no causal language model that transformers can load.
        """
        from transformers import AutoModelForCausalLM

        return cls(load_float32(path, AutoModelForCausalLM), exits, draft_vocabulary)

    def open_cache(self, context_length: int, tree: RowTree) -> EagerCache:
        return EagerCache(self, context_length, tree)

    def close(self) -> None:
        """Nothing to free: torch's memory goes with the object."""


class EagerCache(SlotCache):
    """See `skipstone.runtimes.engines.base.Cache`."""

    def __init__(self, engine: EagerEngine, context_length: int, tree: RowTree) -> None:
        super().__init__(context_length, tree)
        self._engine = engine

    def embed(self, tokens: Sequence[int]) -> FloatArray:
        import torch

        with torch.no_grad():
            return to_numpy(self._engine.decoder.embed_tokens(torch.tensor(list(tokens))))

    def run(
        self, segment: int, rows: Sequence[int], hidden: Sequence[FloatArray], wanted: Sequence[bool]
    ) -> FloatArray:
        import torch

        tree, engine = self._tree, self._engine
        self._take_slots(rows)
        first = engine.exits[segment - 1] if segment else 0
        with torch.no_grad():
            state = to_torch(np.stack(list(hidden)))[None]
            positions = torch.tensor([[tree.position(row) for row in rows]])
            rotary = engine.decoder.rotary_emb(state, positions)
            mask = self._mask(rows)
            for layer in engine.decoder.layers[first : engine.exits[segment]]:
                state = layer(
                    state,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=self._store,
                    use_cache=True,
                    position_embeddings=rotary,
                )
            if segment < len(engine.exits) - 1:
                return to_numpy(state[0])
            kept = state[0][torch.tensor(list(wanted), dtype=torch.bool)]
            return to_numpy(engine.model.lm_head(engine.decoder.norm(kept)))

    def draft_logits(self, hidden: Sequence[FloatArray]) -> FloatArray:
        import torch

        engine = self._engine
        if engine.draft_vocabulary is None:
            raise EngineError("this engine was made without inner exits and so has no draft head")
        with torch.no_grad():
            logits = engine.model.lm_head(engine.decoder.norm(to_torch(np.stack(list(hidden)))))
            return to_numpy(logits[:, torch.from_numpy(engine.draft_vocabulary.astype(np.int64))])
