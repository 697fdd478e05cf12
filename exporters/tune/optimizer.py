"""Optimisation of bf16 weights over a float32 master copy, with Muon on matrices where the recipe asks for
it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from skipstone.exporters.tune.recipe import Training

_IN_LAYERS = re.compile(r"\.(layers|block)\.")  # decoders as Llama has them, T5


class MasterWeights(torch.optim.Optimizer):
    """Steps other optimizers on float32 copies of the parameters and copies the result back in their own
    dtype.

    `groups` are `(parameters, make, options)`: `make(copies, **options)` builds the optimizer of a group, and
    `options["lr"]` is its learning rate, which a scheduler may change here as in any optimizer.
    """

    def __init__(
        self,
        groups: Iterable[tuple[list[nn.Parameter], Callable[..., torch.optim.Optimizer], dict[str, Any]]],
    ):
        chosen = [group for group in groups if group[0]]
        self._masters = [
            [p.detach().clone().float().requires_grad_() for p in params] for params, _, _ in chosen
        ]
        self._inner = [
            make(masters, **options)
            for masters, (_, make, options) in zip(self._masters, chosen, strict=True)
        ]
        super().__init__([{"params": params, "lr": options["lr"]} for params, _, options in chosen], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every group; parameters without a gradient stay as they are."""
        loss = None if closure is None else closure()
        for group, masters, inner in zip(self.param_groups, self._masters, self._inner, strict=True):
            for master, parameter in zip(masters, group["params"], strict=True):
                master.grad = None if parameter.grad is None else parameter.grad.float()
            for inner_group in inner.param_groups:
                inner_group["lr"] = group["lr"]
            inner.step()
            for master, parameter in zip(masters, group["params"], strict=True):
                parameter.copy_(master)
                master.grad = None
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The groups, the float32 copies and the state of the inner optimizers."""
        return {
            "state": {},
            "param_groups": super().state_dict()["param_groups"],
            "masters": [[master.detach() for master in masters] for masters in self._masters],
            "inner": [inner.state_dict() for inner in self._inner],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        for masters, saved in zip(self._masters, state_dict["masters"], strict=True):
            for master, value in zip(masters, saved, strict=True):
                master.copy_(value)
        for inner, saved_inner in zip(self._inner, state_dict["inner"], strict=True):
            inner.load_state_dict(saved_inner)


def build_optimizer(model: nn.Module, training: Training) -> MasterWeights:
    """AdamW on everything, or Muon on the layers' matrices and AdamW on the rest.

    Weight decay goes to matrices and not to norms and biases. Muon is scaled to AdamW's update size
    (Moonshot, arXiv 2502.16982 §2.2), so both take learning rates of the same order.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    use_muon = training.matrix_learning_rate > 0
    in_layers = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and _IN_LAYERS.search(name)
    }
    hidden = [p for _, p in named if use_muon and id(p) in in_layers]
    taken = {id(p) for p in hidden}
    matrices = [p for _, p in named if p.ndim >= 2 and id(p) not in taken]
    vectors = [p for _, p in named if p.ndim < 2]
    adamw = {"lr": training.learning_rate, "betas": (training.beta1, training.beta2), "fused": True}
    muon = {
        "lr": training.matrix_learning_rate,
        "weight_decay": training.weight_decay,
        "adjust_lr_fn": "match_rms_adamw",
    }
    return MasterWeights(
        [
            (hidden, torch.optim.Muon, muon),
            (matrices, torch.optim.AdamW, {**adamw, "weight_decay": training.weight_decay}),
            (vectors, torch.optim.AdamW, {**adamw, "weight_decay": 0.0}),
        ]
    )
