"""A compressed model and the dense one as `skipstone tune` trains them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import TrainerCallback

from skipstone.exporters.compress.activations import stacks_of
from skipstone.exporters.compress.work import Progress, Work
from skipstone.exporters.tune import attention
from skipstone.exporters.tune.distillation import DistillationNet, Lesson
from skipstone.exporters.tune.objective import LayerSkipNet
from skipstone.exporters.tune.seq2seq import Seq2SeqNet

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from skipstone.exporters.compress.recover.step import Recover


def distillation_net(model: Any, work: Work, options: Recover) -> DistillationNet:
    """Both models, their layers matched.

    A layer that stays should give its successor what that was used to: the states which the dense model hands to the
    next layer that stays.
    """
    layers = len(stacks_of(model)[-1].blocks)
    kept = work.kept.get("decoder", tuple(range(layers)))
    return DistillationNet(
        _net(model, work, compile_parts=options.compile),
        _net(work.dense, work, compile_parts=options.compile),
        matched=tuple((own, kept[own]) for own in range(1, layers)) if options.hidden else (),
        lesson=Lesson(options.temperature, options.hidden),
        compile_parts=options.compile,
    )


@contextmanager
def trainable(model: Any, dense: Any, only: Sequence[nn.Parameter] | None = None) -> Iterator[None]:
    """The model with gradients, both with attention that is causal without a mask; as they were afterwards.

    Weights of linear layers that are zero get none: what was pruned stays so. `only` are the weights that are trained,
    where not all are.
    """
    handles = []
    if only is None:
        handles = [
            weight.register_hook(_only_where(kept))  # type: ignore[no-untyped-call]
            for weight, kept in sparse_weights(model.requires_grad_(True))
        ]
    for weight in only or ():
        weight.requires_grad_(True)
    before = [(whole, whole.config._attn_implementation) for whole in (model, dense)]
    for whole in (model, dense):
        if not whole.config.is_encoder_decoder:  # these are given their masks
            attention.use_for_training(whole)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for whole, implementation in before:
            whole.config._attn_implementation = implementation
            whole.to("cpu").eval().requires_grad_(False).zero_grad(set_to_none=True)


def sparse_weights(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The weights of linear layers that have zeros, each with where it has none."""
    linear = [part for part in model.modules() if isinstance(part, nn.Linear)]
    return [(part.weight, part.weight.detach() != 0) for part in linear if not part.weight.all()]


@contextmanager
def in_bfloat16(*models: nn.Module) -> Iterator[None]:
    """Models with weights in bfloat16; in float32 afterwards, and what took no gradients as it was."""
    weights = [weight for model in models for weight in model.parameters()]
    kept = [(weight, weight.data) for weight in weights if not weight.requires_grad]
    for weight in weights:
        weight.data = weight.data.bfloat16()
    try:
        yield
    finally:
        for weight in weights:
            weight.data = weight.data.float()
        for weight, data in kept:
            weight.data = data


class TellProgress(TrainerCallback):
    """Tells a run of compression how far its training is, and the losses."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._losses = ""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say which step it was."""
        self._progress(f"recover{self._losses}", state.global_step, state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the losses for the next step's line."""
        if logs and "final_loss" in logs:
            self._losses = f", loss {logs['final_loss']:.3f}, exits {logs['exit_loss']:.3f}"


def _net(model: Any, work: Work, *, compile_parts: bool) -> LayerSkipNet | Seq2SeqNet:
    rates = (0.0,) * len(stacks_of(model)[-1].blocks)
    if model.config.is_encoder_decoder:
        return Seq2SeqNet(
            model,
            rates,
            encoder_exits=() if model is work.dense else work.encoder_exits or (),
            encoder_share=0.25,
            compile_parts=compile_parts,
        )
    return LayerSkipNet(model, rates, compile_parts=compile_parts)


def _only_where(mask: Tensor) -> Any:
    return lambda gradient: gradient * mask.to(gradient.device)
