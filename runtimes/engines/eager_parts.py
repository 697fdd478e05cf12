"""What the reference engines share: loading a checkpoint, and K/V with a slot per position or row."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from skipstone.errors import CheckpointError, ContextFullError, UsageError
from skipstone.runtimes.rows import RowTree

if TYPE_CHECKING:
    import torch

FloatArray = NDArray[np.float32]


class SlotCache:
    """The part of a cache that does not depend on the model; see `skipstone.runtimes.engines.base.Cache`.

    Positions below `tree.base` lie in the slots of their number; row r lies in slot base + r. A row sees the
    slots below base, its ancestors' and its own.
    """

    max_width = 512
    max_branches = 512

    def __init__(self, context_length: int, tree: RowTree) -> None:
        self.context_length = context_length
        self._tree = tree
        self._store = SlotStore(context_length)

    def commit(self, path: Sequence[int]) -> None:
        tree = self._tree
        ran = [row for row in path if tree.progress[row]]  # others have no K/V, and perhaps no slot
        self._store.move([tree.base + row for row in ran], [tree.position(row) for row in ran])

    def rewind(self, length: int) -> None:
        """Nothing to do: slots at and past `length` are out of every row's sight until they are written
        again.
        """

    def close(self) -> None:
        self._store.layers.clear()

    def _take_slots(self, rows: Sequence[int]) -> None:
        """Have the next K/V of these rows written to their slots."""
        import torch

        tree = self._tree
        if tree.base + len(tree) > self.context_length:
            raise ContextFullError(
                f"{tree.base + len(tree)} positions: the session holds {self.context_length}",
                hint="raise --context-length or generate fewer tokens",
            )
        self._store.slots = torch.tensor([tree.base + row for row in rows])

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


class SlotStore:
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

    def get_seq_length(self, _layer: int = 0) -> int:
        """What transformers would count positions from; ours come with the bias."""
        return 0

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy slots to slots, all read before any is written."""
        for keys, values in self.layers.values():
            keys[:, :, list(targets)] = keys[:, :, list(sources)]
            values[:, :, list(targets)] = values[:, :, list(sources)]


def load_float32(path: str | os.PathLike[str], auto_class: Any) -> Any:
    """A checkpoint folder as transformers' own model, in float32 with eager attention, ready to run.

    Args:
        path: the folder.
        auto_class: of transformers, `AutoModelForCausalLM` say.

    Raises:
        CheckpointError: the folder holds no such model that transformers can load.
    """
    import torch

    if not (Path(path) / "config.json").is_file():
        raise CheckpointError(f"{path}: no config.json found", hint="pass a Hugging Face checkpoint folder")
    try:
        model = auto_class.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: transformers cannot load it: {error}") from error
    return model.eval()


def layer_edges(exits: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """The exits with the number of layers added.

    Raises:
        UsageError: exits that are not ascending numbers of layers below the last.
    """
    edges = (*exits, num_layers)
    if sorted(set(edges)) != list(edges) or edges[0] < 1:
        raise UsageError(f"exits {tuple(exits)}: ascending numbers from 1 to {num_layers - 1} were expected")
    return edges


def to_torch(array: FloatArray) -> torch.Tensor:
    """A tensor of its own or over the array's memory, float32."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(array, np.float32))


def to_numpy(tensor: torch.Tensor) -> FloatArray:
    """A copy."""
    return np.array(tensor.numpy(), np.float32)
