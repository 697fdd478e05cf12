"""The reference engine for encoder-decoders of the T5 family: transformers' own blocks in torch, float32.

    >>> engine = EagerT5Engine.from_checkpoint("samples/models/speller", exits=(1,))
    >>> session = Session(engine, context_length=256)
    >>> session.encode(source)
    >>> logits = session.prefill([engine.encoder.start_token_id])

Cross-attention's K/V are recomputed at every call, from the encoder's output. Slow and plain on purpose.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from skipstone.bundle import EncoderFacts
from skipstone.errors import EngineError
from skipstone.runtimes.engines.base import Settled
from skipstone.runtimes.engines.eager_parts import SlotCache, layer_edges, load_float32, to_numpy, to_torch
from skipstone.runtimes.rows import RowTree

if TYPE_CHECKING:
    import torch

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]

_LENGTH = 512  # of sources and of the decoder's text; T5 has no limit of its own


class EagerT5Engine:
    """See `skipstone.runtimes.engines.base.Engine`.

    Args:
        model: a `T5ForConditionalGeneration` in float32 and with eager attention.
        exits: the decoder's inner exits, ascending; its number of layers is added.
        draft_vocabulary: token ids that the draft head gives logits for; None: all.
        encoder_exits: layer counts at which the encoder may stop, ascending.

    Raises:
        UsageError: exits that are not ascending numbers of layers below the last.
        EngineError: a model whose parts are not where T5 has them.
    """

    max_context_length = _LENGTH

    def __init__(
        self,
        model: Any,
        exits: Sequence[int] = (),
        draft_vocabulary: IntArray | None = None,
        encoder_exits: Sequence[int] = (),
    ) -> None:
        parts = ("encoder", "decoder", "shared", "lm_head")
        if not all(hasattr(model, part) for part in parts) or not hasattr(model.decoder, "block"):
            raise EngineError(f"{type(model).__name__} is not built as T5 ({', '.join(parts)})")
        config = model.config
        self.model = model
        self.exits: tuple[int, ...] = layer_edges(exits, len(model.decoder.block))
        self.encoder_edges = layer_edges(encoder_exits, len(model.encoder.block))
        self.encoder = EncoderFacts(
            num_layers=self.encoder_edges[-1],
            exits=self.encoder_edges[:-1],
            max_source_length=_LENGTH,
            start_token_id=config.decoder_start_token_id,
        )
        self.hidden_size, self.vocab_size = int(config.d_model), int(config.vocab_size)
        self._head_scale = self.hidden_size**-0.5 if config.scale_decoder_outputs else 1.0
        ids = np.arange(self.vocab_size) if draft_vocabulary is None else draft_vocabulary
        self.draft_vocabulary: IntArray | None = np.asarray(ids, np.int32) if exits else None

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        exits: Sequence[int] = (),
        draft_vocabulary: IntArray | None = None,
        encoder_exits: Sequence[int] = (),
    ) -> EagerT5Engine:
        """Load a checkpoint folder in float32.

        Raises:
            CheckpointError: the folder holds no encoder-decoder that transformers can load.
        """
        from transformers import AutoModelForSeq2SeqLM

        return cls(load_float32(path, AutoModelForSeq2SeqLM), exits, draft_vocabulary, encoder_exits)

    def open_cache(self, context_length: int, tree: RowTree) -> EagerT5Cache:
        return EagerT5Cache(self, context_length, tree)

    def close(self) -> None:
        """Nothing to free: torch's memory goes with the object."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final norm and LM head."""
        logits: torch.Tensor = self.model.lm_head(
            self.model.decoder.final_layer_norm(hidden) * self._head_scale
        )
        return logits


class EagerT5Cache(SlotCache):
    """See `skipstone.runtimes.engines.base.SourceCache`."""

    def __init__(self, engine: EagerT5Engine, context_length: int, tree: RowTree) -> None:
        super().__init__(context_length, tree)
        self._engine = engine
        self._encoded: torch.Tensor | None = None

    def encode(self, source: Sequence[int], settled: Settled | None = None) -> int:
        import torch

        encoder, first, bias = self._engine.model.encoder, 0, None
        with torch.no_grad():
            state = encoder.embed_tokens(torch.tensor([list(source)]))
            for edge in self._engine.encoder_edges:
                before = state
                for block in encoder.block[first:edge]:
                    state, bias, _ = block(state, position_bias=bias)  # the first block's serves them all
                first = edge
                inner = edge != self._engine.encoder_edges[-1]
                if inner and settled is not None and settled(edge, to_numpy(before[0]), to_numpy(state[0])):
                    break
            self._encoded = encoder.final_layer_norm(state)
        return first

    def embed(self, tokens: Sequence[int]) -> FloatArray:
        import torch

        with torch.no_grad():
            return to_numpy(self._engine.model.shared(torch.tensor(list(tokens))))

    def run(
        self, segment: int, rows: Sequence[int], hidden: Sequence[FloatArray], wanted: Sequence[bool]
    ) -> FloatArray:
        import torch

        engine = self._engine
        self._take_slots(rows)
        first = engine.exits[segment - 1] if segment else 0
        with torch.no_grad():
            state = to_torch(np.stack(list(hidden)))[None]
            mask, bias = self._mask(rows), self._bias(rows)
            for block in engine.model.decoder.block[first : engine.exits[segment]]:
                own, cross, feed_forward = block.layer
                state = own(state, attention_mask=mask, position_bias=bias, past_key_values=self._store)[0]
                state = feed_forward(cross(state, key_value_states=self._encoded)[0])
            if segment < len(engine.exits) - 1:
                return to_numpy(state[0])
            return to_numpy(engine.logits(state[0][torch.tensor(list(wanted), dtype=torch.bool)]))

    def draft_logits(self, hidden: Sequence[FloatArray]) -> FloatArray:
        import torch

        engine = self._engine
        if engine.draft_vocabulary is None:
            raise EngineError("this engine was made without inner exits and so has no draft head")
        with torch.no_grad():
            logits = engine.logits(to_torch(np.stack(list(hidden))))
            return to_numpy(logits[:, torch.from_numpy(engine.draft_vocabulary.astype(np.int64))])

    def _bias(self, rows: Sequence[int]) -> torch.Tensor:
        """The relative position bias, [1, heads, n, slots], by the positions of rows and of what lies in the slots."""
        import torch

        tree = self._tree
        attention: Any = self._engine.model.decoder.block[0].layer[0].SelfAttention
        places = torch.arange(self.context_length)
        held = min(len(tree), self.context_length - tree.base)
        places[tree.base : tree.base + held] = torch.tensor([tree.position(row) for row in range(held)])
        asking = torch.tensor([tree.position(row) for row in rows])
        buckets = attention._relative_position_bucket(
            places[None, :] - asking[:, None],
            bidirectional=False,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        bias: torch.Tensor = attention.relative_attention_bias(buckets)
        return bias.permute(2, 0, 1)[None]
