"""The LayerSkip objective on any Hugging Face decoder: layer dropout, exits through one head, distillation.

>>> net = LayerSkipNet(model, dropout_rates(0.05, 12))
>>> losses = net(input_ids, exits=(2, 4))  # losses.final and losses.exits, both scalars
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from skipstone.errors import SkipstoneError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ExitLosses(NamedTuple):
    """Mean losses per token in nats, float32: of the last layer, and summed over the exits asked for.

    `alignment` is weighted: an encoder-decoder's (see `alignment`), or that of hidden states with a teacher's (see
    `distillation`).
    """

    final: Tensor
    exits: Tensor
    alignment: Tensor | float = 0.0


class LayerSkipNet(nn.Module):
    """Runs a decoder layer by layer with layer dropout, and its last layer and chosen exits through the head.

    It calls the model's own layers, norm and head, so weights and config stay those of the checkpoint. Layer
    dropout skips a layer for whole sequences, drawn per sequence, and only while training (arXiv 2404.16710
    §3.1.1).
    """

    def __init__(
        self, model: PreTrainedModel, rates: tuple[float, ...], *, compile_parts: bool = False
    ) -> None:
        super().__init__()
        check_decoder(model)
        self.model = model
        self.rates = rates
        # One graph serves all layers and one the heads of all exits: their weights are inputs of the graph.
        self._layer = torch.compile(_run_layer, dynamic=False) if compile_parts else _run_layer
        self._final_loss = torch.compile(final_loss, dynamic=False) if compile_parts else final_loss
        self._exit_loss = torch.compile(exit_loss, dynamic=False) if compile_parts else exit_loss

    def forward(self, input_ids: Tensor, exits: tuple[int, ...] = (), distil: float = 0.0) -> ExitLosses:
        """Losses for next-token prediction on `input_ids`, int64 [batch, length].

        `distil` is the share of the last layer's (detached) distribution in the target of every exit.
        """
        inputs, targets = input_ids[:, :-1], input_ids[:, 1:].reshape(-1)
        states = self.hidden_states(inputs, exits)
        norm, head = self.model.model.norm, self.model.lm_head
        final, teacher = self._final_loss(norm, head, states[-1], targets)
        share = torch.tensor(distil, dtype=torch.float32, device=teacher.device)
        exit_losses = [self._exit_loss(norm, head, state, targets, teacher, share) for state in states[:-1]]
        total = torch.stack(exit_losses).sum() if exit_losses else torch.zeros_like(final)
        return ExitLosses(final, total)

    def hidden_states(self, inputs: Tensor, exits: tuple[int, ...]) -> list[Tensor]:
        """Hidden states [batch, length, width] after each of `exits` layers, in rising order, then after the
        last.
        """
        body = self.model.model
        hidden = body.embed_tokens(inputs)
        positions = torch.arange(inputs.shape[1], device=inputs.device).unsqueeze(0)
        rotary = body.rotary_emb(hidden, positions)
        states = []
        for index, layer in enumerate(body.layers):
            hidden = self._layer(layer, hidden, rotary, self._kept(index, hidden))
            if index + 1 in exits:
                states.append(hidden)
        return [*states, hidden]

    def _kept(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Which sequences run `layer`: bool [batch, 1, 1], or None outside training."""
        if not self.training:
            return None
        draw = torch.rand(hidden.shape[0], 1, 1, device=hidden.device)
        return draw >= self.rates[layer]


def check_decoder(model: PreTrainedModel) -> None:
    """Raise SkipstoneError unless `model` has a decoder's parts: embedding, layers, norm and LM head."""
    body = getattr(model, "model", None)
    parts = ("embed_tokens", "layers", "norm", "rotary_emb")
    missing = [f"model.{part}" for part in parts if not hasattr(body, part)]
    missing += [] if hasattr(model, "lm_head") else ["lm_head"]
    if missing:
        raise SkipstoneError(
            f"{type(model).__name__} has no {', '.join(missing)}: not a decoder with early exits to tune",
            hint="tune works on decoders built like Llama, Mistral, SmolLM or Qwen",
        )


def _run_layer(
    layer: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor], kept: Tensor | None
) -> Tensor:
    # No mask: the attention functions of transformers are causal then, and a batch has no padding.
    output = cast(Tensor, layer(hidden, attention_mask=None, position_embeddings=rotary))
    return output if kept is None else torch.where(kept, output, hidden)


def final_loss(
    norm: nn.Module, head: nn.Module, hidden: Tensor, targets: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the last layer, and its distribution, detached, to distil the exits from.

    `targets` is int64 [batch * length], negative where there is none; `scale` is that of the head's inputs.
    """
    logits = _logits(norm, head, hidden, scale)
    teacher = functional.softmax(logits.detach(), dim=-1).to(hidden.dtype)
    return functional.cross_entropy(logits, targets), teacher


def exit_loss(
    norm: nn.Module,
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    teacher: Tensor,
    share: Tensor,
    scale: float = 1.0,
) -> Tensor:
    """(1 - share) * cross-entropy on the data + share * cross-entropy to the teacher's distribution.

    The latter is KL(teacher || exit) plus the teacher's entropy, which has no gradient. With q the mixed
    target, both together are logsumexp(z) - Σ q z. Positions with a negative target do not count.
    """
    logits = _logits(norm, head, hidden, scale)
    counted = targets >= 0
    data = logits.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    soft = (teacher * logits).sum(-1)
    losses = torch.logsumexp(logits, dim=-1) - (1 - share) * data - share * soft
    return torch.where(counted, losses, 0.0).sum() / counted.sum()


def _logits(norm: nn.Module, head: nn.Module, hidden: Tensor, scale: float) -> Tensor:
    """Logits in float32 [batch * length, vocabulary] through the shared final norm and LM head."""
    return cast(Tensor, head(norm(hidden) * scale)).float().flatten(0, 1)


def scale_residual_projections(model: PreTrainedModel) -> None:
    """Divide the initial weights of every projection into the residual stream by sqrt(2 L), as GPT-2 does."""
    layers: Any = model.model.layers
    factor = (2 * len(layers)) ** -0.5
    with torch.no_grad():
        for layer in layers:
            layer.self_attn.o_proj.weight.mul_(factor)
            layer.mlp.down_proj.weight.mul_(factor)
