"""Linear layers as two smaller ones, W = up · down: what a checkpoint keeps of them, and the layers themselves.

A checkpoint whose layers were factored (`skipstone.exporters.compress.low_rank`) is one like any other: its
model.safetensors holds the products, which transformers loads, and GGUF stores. Formats that are made from the layers
put the pairs in their places, and so need fewer weights:

| `factors.safetensors` | by the name of a weight [outputs, inputs] |
|---|---|
| `NAME:up` | float32 [outputs, rank] |
| `NAME:down` | float32 [rank, inputs] |
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from skipstone.errors import CheckpointError
from skipstone.exporters.checkpoint import FACTORS_FILE, load_eager

_Model = TypeVar("_Model", bound=nn.Module)

_UP, _DOWN = ":up", ":down"
_CLOSE = 1e-4  # of a product to the weight, in parts of its norm: sums in another order, not another weight


class FactoredLinear(nn.Module):
    """A linear layer through a narrow middle.

    Args:
        down: [rank, inputs].
        up: [outputs, rank].
        bias: [outputs]; None: there is none.
    """

    def __init__(self, down: Tensor, up: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.down, self.up = _linear(down, None), _linear(up, bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.down(x))
        return out

    @property
    def weight(self) -> Tensor:
        """The matrix that meets the inputs first: T5 asks its feed-forward network's for its type."""
        return self.down.weight

    @property
    def rank(self) -> int:
        """Channels between the two."""
        return self.down.out_features

    @torch.no_grad()
    def product(self) -> Tensor:
        """The matrix that the two amount to, [outputs, inputs]."""
        return self.up.weight.detach() @ self.down.weight.detach()


def load_factored(folder: Path) -> Any:
    """As `skipstone.exporters.checkpoint.load_eager`, with pairs for the layers that the checkpoint has factors of.

    Raises:
        CheckpointError: the factors are not those of its weights.
    """
    return put_factors(load_eager(folder), folder)


@torch.no_grad()
def put_factors(model: _Model, folder: Path) -> _Model:
    """Put pairs in the place of the linear layers that a checkpoint has factors of, in place; the model.

    Args:
        model: loaded from the folder, in float32.
        folder: the checkpoint's.

    Raises:
        CheckpointError: the factors are not those of its weights.
    """
    for name, up, down in _read(folder):
        path = name.removesuffix(".weight")
        try:
            linear = model.get_submodule(path)
        except AttributeError:
            linear = None
        shape = (up.shape[0], down.shape[1])
        if not isinstance(linear, nn.Linear) or tuple(linear.weight.shape) != shape:
            raise _not_theirs(folder, f"no linear layer {path} of {shape[0]} by {shape[1]} weights")
        distance = float((up @ down - linear.weight).norm() / linear.weight.norm().clamp(min=1e-30))
        if not distance <= _CLOSE:
            raise _not_theirs(folder, f"{name} differs from their product by {distance:.1e} of its norm")
        put_in_place(model, path, FactoredLinear(down, up, linear.bias))
    return model


def put_in_place(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of another."""
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, module)


def factored(model: nn.Module) -> dict[str, FactoredLinear]:
    """A model's pairs, by the names of the weights that they stand for."""
    return {
        f"{path}.weight": module
        for path, module in model.named_modules()
        if isinstance(module, FactoredLinear)
    }


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """`model.state_dict()` as it is without pairs: products under the names of the weights that they stand for."""
    pairs = {name.removesuffix(".weight"): pair for name, pair in factored(model).items()}
    state = {}
    for name, tensor in model.state_dict().items():
        path, _, part = name.rpartition(".")
        owner, _, side = path.rpartition(".")
        if owner not in pairs:
            state[name] = tensor
        elif side == "up":  # its bias is that of the whole
            state[f"{owner}.{part}"] = pairs[owner].product() if part == "weight" else tensor
    return state


def write_factors(model: nn.Module, folder: Path) -> None:
    """Write the factors of a model's pairs beside its weights; nothing, where it has none."""
    from safetensors.torch import save_file

    stored = {}
    for name, pair in factored(model).items():
        stored[name + _UP] = pair.up.weight.detach().contiguous()
        stored[name + _DOWN] = pair.down.weight.detach().contiguous()
    if stored:
        save_file(stored, folder / FACTORS_FILE)


def _read(folder: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, up and down of every weight that a checkpoint has factors of.

    Raises:
        CheckpointError: they cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / FACTORS_FILE
    if not file.is_file():
        return
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: not readable as safetensors: {error}", hint=_HINT) from error
    for name in sorted({key.rpartition(":")[0] for key in stored}):
        up, down = stored.get(name + _UP), stored.get(name + _DOWN)
        if up is None or down is None or up.dim() != 2 or down.dim() != 2 or up.shape[1] != down.shape[0]:
            raise _not_theirs(folder, f"{name or 'a tensor'} has not two matrices that can be multiplied")
        yield name, up.float(), down.float()


_HINT = f"compress the checkpoint again, or remove {FACTORS_FILE} to export its weights"


def _not_theirs(folder: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{folder / FACTORS_FILE}: not the factors of the checkpoint's weights: {found}", hint=_HINT
    )


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of these, as they are."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer
