"""The LayerSkip objective on an encoder-decoder: exits of the decoder through one head, exits of the encoder.

>>> net = Seq2SeqNet(model, dropout_rates(0.1, 4), encoder_exits=(3, 5), encoder_share=0.25)
>>> losses = net(**batch, exits=(1, 2))  # losses.final and losses.exits, both scalars
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from skipstone.errors import SkipstoneError
from skipstone.exporters.tune.alignment import alignment_loss
from skipstone.exporters.tune.objective import ExitLosses, exit_loss, final_loss
from skipstone.exporters.tune.pairs import NO_TARGET

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HIDDEN = -1e9  # added to the scores of padding


class Seq2SeqNet(nn.Module):
    """Runs a T5 layer by layer, its decoder with layer dropout and its encoder stopping early for some sequences.

    It calls the model's own layers, norms and head, so weights and config stay those of the checkpoint. The bias by
    relative position, which the first layer of each stack keeps, is looked up once per stack.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rates: tuple[float, ...],
        *,
        encoder_exits: tuple[int, ...] = (),
        encoder_share: float = 0.0,
        alignment_weight: float = 0.0,
        compile_parts: bool = False,
    ) -> None:
        super().__init__()
        check_encoder_decoder(model)
        check_encoder_exits(encoder_exits, len(model.encoder.block))  # type: ignore[union-attr, arg-type]
        self.model = model
        self.rates = rates
        self.encoder_exits = encoder_exits
        self.encoder_share = encoder_share
        self.alignment_weight = alignment_weight
        config: Any = model.config
        self.scale = config.d_model**-0.5 if config.scale_decoder_outputs else 1.0
        # One graph each for all exits and lengths: weights are inputs of the graph. Layers gain nothing from it.
        self._final_loss = _compiled(final_loss) if compile_parts else final_loss
        self._exit_loss = _compiled(exit_loss) if compile_parts else exit_loss

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        alignment: Tensor | None = None,
        exits: tuple[int, ...] = (),
        distil: float = 0.0,
    ) -> ExitLosses:
        """Losses for the targets `labels`, int64 [batch, length], of the sources `input_ids`, [batch, source length].

        `attention_mask` is 0 for padding of the sources. `distil` is the share of the last layer's (detached)
        distribution in the target of every exit of the decoder. `alignment`, of the shape of `labels`, holds the
        targets' places in the sources, negative where there is none; None leaves that loss out.
        """
        source = self.encode(input_ids, attention_mask)
        crossings: list[Tensor] = []
        states = self.hidden_states(source, attention_mask, labels, exits, crossings)
        model: Any = self.model
        norm, head, targets = model.decoder.final_layer_norm, model.lm_head, labels.reshape(-1)
        final, teacher = self._final_loss(norm, head, states[-1], targets, self.scale)
        share = torch.tensor(distil, dtype=torch.float32, device=teacher.device)
        exit_losses = [
            self._exit_loss(norm, head, state, targets, teacher, share, self.scale) for state in states[:-1]
        ]
        total = torch.stack(exit_losses).sum() if exit_losses else torch.zeros_like(final)
        if alignment is None:
            return ExitLosses(final, total)
        padding = _padding(attention_mask, source)
        losses = [
            alignment_loss(layer.layer[1], crossing, source, padding, alignment)
            for layer, crossing in zip(model.decoder.block, crossings, strict=True)
        ]
        return ExitLosses(final, total, self.alignment_weight * torch.stack(losses).mean())

    def encode(self, input_ids: Tensor, attention_mask: Tensor, *, exit_layer: int | None = None) -> Tensor:
        """What the decoder attends to, [batch, source length, width], after the encoder's final norm.

        While training, a share of the sequences stops at an encoder exit drawn for each; otherwise all stop at
        `exit_layer`, or run through the whole encoder.
        """
        model: Any = self.model
        encoder = model.encoder
        hidden = model.shared(input_ids)
        bias = _bias(encoder, input_ids.shape[1]) + _padding(attention_mask, hidden)
        stops = self._stops(hidden)
        output = hidden
        for index, layer in enumerate(encoder.block):
            hidden = _encoder_layer(layer, hidden, bias)
            if index + 1 == exit_layer:
                return cast(Tensor, encoder.final_layer_norm(hidden))
            if stops is not None and index + 1 in self.encoder_exits:
                output = torch.where(stops == index + 1, hidden, output)
        chosen = hidden if stops is None else torch.where(stops == 0, hidden, output)
        return cast(Tensor, encoder.final_layer_norm(chosen))

    def hidden_states(
        self,
        source: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        exits: tuple[int, ...],
        crossings: list[Tensor] | None = None,
    ) -> list[Tensor]:
        """Hidden states [batch, length, width] after each of `exits` decoder layers, rising, then after the last.

        What enters the layers' cross-attention is appended to `crossings`.
        """
        model: Any = self.model
        hidden = model.shared(shifted(labels, model.config.decoder_start_token_id))
        length = labels.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=labels.device).triu(1)
        bias = _bias(model.decoder, length) + future.to(hidden.dtype) * _HIDDEN
        padding = _padding(attention_mask, hidden)
        states = []
        for index, layer in enumerate(model.decoder.block):
            kept = self._kept(index, hidden)
            hidden, crossing = _decoder_layer(layer, hidden, bias, source, padding, kept)
            if crossings is not None:
                crossings.append(crossing)
            if index + 1 in exits:
                states.append(hidden)
        return [*states, hidden]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits in float32 [batch, length, vocabulary] of hidden states of the decoder, at any of its exits."""
        model: Any = self.model
        return cast(Tensor, model.lm_head(model.decoder.final_layer_norm(hidden) * self.scale)).float()

    def _stops(self, hidden: Tensor) -> Tensor | None:
        """The encoder exit of every sequence, 0 for none: int64 [batch, 1, 1], or None outside training."""
        if not self.training or not self.encoder_exits:
            return None
        rows = hidden.shape[0]
        exits = torch.tensor(self.encoder_exits, device=hidden.device)
        drawn = exits[torch.randint(len(exits), (rows,), device=hidden.device)]
        stopping = torch.rand(rows, device=hidden.device) < self.encoder_share
        return (drawn * stopping).view(rows, 1, 1)

    def _kept(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Which sequences run decoder layer `layer`: bool [batch, 1, 1], or None outside training."""
        if not self.training:
            return None
        return torch.rand(hidden.shape[0], 1, 1, device=hidden.device) >= self.rates[layer]


def check_encoder_decoder(model: PreTrainedModel) -> None:
    """Raise SkipstoneError unless `model` has a T5's parts."""
    parts = ("shared", "encoder", "decoder", "lm_head")
    missing = [part for part in parts if not hasattr(model, part)]
    missing += [f"{s}.block" for s in ("encoder", "decoder") if not hasattr(getattr(model, s, None), "block")]
    if missing:
        raise SkipstoneError(
            f"{type(model).__name__} has no {', '.join(missing)}: not an encoder-decoder to tune",
            hint='the task "seq2seq" works on T5 and its kin; leave task out of the recipe for a decoder',
        )


def check_encoder_exits(exits: tuple[int, ...], num_layers: int) -> None:
    """Raise SkipstoneError for an exit that is not below the encoder's last layer."""
    wrong = [exit_layer for exit_layer in exits if exit_layer >= num_layers]
    if wrong:
        raise SkipstoneError(
            f"seq2seq.encoder_exits: exit {wrong[0]} is not below the encoder's last layer, {num_layers}",
            hint=f"an exit is a number of layers run, from 1 to {num_layers - 1} for this model",
        )


def shifted(labels: Tensor, start: int) -> Tensor:
    """The decoder's inputs for `labels`: the start token, then every target but the last."""
    inputs = labels.new_full(labels.shape, start)
    inputs[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == NO_TARGET, start)
    return inputs


def scale_residual_projections(model: PreTrainedModel) -> None:
    """Divide the initial weights of every projection into a residual stream by the root of their number in it."""
    t5: Any = model
    with torch.no_grad():
        for stack in (t5.encoder, t5.decoder):
            projections = [
                module
                for name, module in stack.named_modules()
                if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in ("o", "wo")
            ]
            for projection in projections:
                projection.weight.mul_(len(projections) ** -0.5)


def _bias(stack: Any, length: int) -> Tensor:
    """The stack's bias by relative position: [1, heads, length, length]."""
    return cast(Tensor, stack.block[0].layer[0].SelfAttention.compute_bias(length, length))


def _padding(attention_mask: Tensor, hidden: Tensor) -> Tensor:
    """What hides the padding of the sources: [batch, 1, 1, source length]."""
    return ((1 - attention_mask) * _HIDDEN).to(hidden.dtype)[:, None, None, :]


def _encoder_layer(layer: nn.Module, hidden: Tensor, bias: Tensor) -> Tensor:
    return cast(Tensor, layer(hidden, position_bias=bias)[0])


def _decoder_layer(
    layer: Any, hidden: Tensor, bias: Tensor, source: Tensor, padding: Tensor, kept: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The layer's output, and what enters its cross-attention."""
    attend, cross, transform = layer.layer
    crossing = cast(Tensor, attend(hidden, position_bias=bias)[0])
    output = cast(Tensor, transform(cross(crossing, key_value_states=source, position_bias=padding)[0]))
    return output if kept is None else torch.where(kept, output, hidden), crossing


def _compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=True)
