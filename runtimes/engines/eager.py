"""The reference engine: a Hugging Face checkpoint in torch, float32, layer by layer as transformers wrote it.

Slow and plain on purpose; every other engine is compared with it. Torch is imported when an engine is made.

    >>> engine = EagerEngine.from_checkpoint("samples/models/coder", exits=(2, 4))
    >>> session = Session(engine, context_length=256)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from skipstone.bundle import EncoderFacts
from skipstone.errors import CheckpointError, ContextFullError, EngineError, UsageError
from skipstone.runtimes.rows import RowTree

if TYPE_CHECKING:
    import torch

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]

_WIDTH = 512
_BRANCHES = 512


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
        num_layers = len(decoder.layers)
        edges = (*exits, num_layers)
        if sorted(set(edges)) != list(edges) or edges[0] < 1:
            raise UsageError(
                f"exits {tuple(exits)}: ascending numbers from 1 to {num_layers - 1} were expected"
            )
        config = model.config
        self.model, self.decoder = model, decoder
        self.exits: tuple[int, ...] = edges
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
        import torch
        from transformers import AutoModelForCausalLM

        if not (Path(path) / "config.json").is_file():
            raise CheckpointError(
                f"{path}: no config.json found", hint="pass a Hugging Face checkpoint folder"
            )
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, attn_implementation="eager"
            )
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: transformers cannot load it: {error}") from error
        return cls(model.eval(), exits, draft_vocabulary)

    def open_cache(self, context_length: int, tree: RowTree) -> EagerCache:
        return EagerCache(self, context_length, tree)

    def close(self) -> None:
        """Nothing to free: torch's memory goes with the object."""


class EagerCache:
    """K/V in one tensor per layer with a slot per position or row; see
    `skipstone.runtimes.engines.base.Cache`.

    Positions below `tree.base` lie in the slots of their number; row r lies in slot base + r. A row sees the
    slots below base, its ancestors' and its own.
    """

    max_width = _WIDTH
    max_branches = _BRANCHES

    def __init__(self, engine: EagerEngine, context_length: int, tree: RowTree) -> None:
        self.context_length = context_length
        self._engine, self._tree = engine, tree
        self._store = _SlotStore(context_length)

    def embed(self, tokens: Sequence[int]) -> FloatArray:
        import torch

        with torch.no_grad():
            return _to_numpy(self._engine.decoder.embed_tokens(torch.tensor(list(tokens))))

    def run(
        self, segment: int, rows: Sequence[int], hidden: Sequence[FloatArray], wanted: Sequence[bool]
    ) -> FloatArray:
        import torch

        tree, engine = self._tree, self._engine
        if tree.base + len(tree) > self.context_length:
            raise ContextFullError(
                f"{tree.base + len(tree)} positions: the session holds {self.context_length}",
                hint="raise --context-length or generate fewer tokens",
            )
        first = engine.exits[segment - 1] if segment else 0
        with torch.no_grad():
            state = _to_torch(np.stack(list(hidden)))[None]
            positions = torch.tensor([[tree.position(row) for row in rows]])
            rotary = engine.decoder.rotary_emb(state, positions)
            self._store.slots = torch.tensor([tree.base + row for row in rows])
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
                return _to_numpy(state[0])
            kept = state[0][torch.tensor(list(wanted), dtype=torch.bool)]
            return _to_numpy(engine.model.lm_head(engine.decoder.norm(kept)))

    def draft_logits(self, hidden: Sequence[FloatArray]) -> FloatArray:
        import torch

        engine = self._engine
        if engine.draft_vocabulary is None:
            raise EngineError("this engine was made without inner exits and so has no draft head")
        with torch.no_grad():
            logits = engine.model.lm_head(engine.decoder.norm(_to_torch(np.stack(list(hidden)))))
            return _to_numpy(logits[:, torch.from_numpy(engine.draft_vocabulary.astype(np.int64))])

    def commit(self, path: Sequence[int]) -> None:
        tree = self._tree
        self._store.move([tree.base + row for row in path], [tree.position(row) for row in path])

    def rewind(self, length: int) -> None:
        """Nothing to do: slots at and past `length` are out of every row's sight until they are written
        again.
        """

    def close(self) -> None:
        self._store.layers.clear()

    def _mask(self, rows: Sequence[int]) -> torch.Tensor:
        """What is added to the attention scores, [1, 1, n, slots]: 0 where a row may look, else the lowest
        float.
        """
        import torch

        tree = self._tree
        mask = torch.full((len(rows), self.context_length), torch.finfo(torch.float32).min)
        mask[:, : tree.base] = 0.0
        for index, row in enumerate(rows):
            mask[index, [tree.base + ancestor for ancestor in tree.path(row)]] = 0.0
        return mask[None, None]


class _SlotStore:
    """Stands where transformers expects its cache: `update` writes the batch's K/V into its slots and returns
    all.
    """

    def __init__(self, num_slots: int) -> None:
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.slots: torch.Tensor
        self._num_slots = num_slots

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the batch, [1, heads, n, head_dim], into the slots; returns [1, heads, slots,
        head_dim].
        """
        if layer not in self.layers:
            shape = (1, key.shape[1], self._num_slots)
            self.layers[layer] = (
                key.new_zeros((*shape, key.shape[3])),
                value.new_zeros((*shape, value.shape[3])),
            )
        keys, values = self.layers[layer]
        keys[:, :, self.slots], values[:, :, self.slots] = key, value
        return keys, values

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy slots to slots, all read before any is written."""
        for keys, values in self.layers.values():
            keys[:, :, list(targets)] = keys[:, :, list(sources)]
            values[:, :, list(targets)] = values[:, :, list(sources)]


def _to_torch(array: FloatArray) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array, np.float32))


def _to_numpy(tensor: torch.Tensor) -> FloatArray:
    return np.array(tensor.numpy(), np.float32)
