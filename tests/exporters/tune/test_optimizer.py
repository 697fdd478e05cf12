from __future__ import annotations

import copy

import torch
from transformers import LlamaForCausalLM, T5ForConditionalGeneration

from skipstone.exporters.tune.optimizer import MasterWeights, build_optimizer
from skipstone.exporters.tune.recipe import Training


def take_steps(
    optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, count: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        parameter.grad = (scale * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
        optimizer.step()


def master_adamw(parameter: torch.nn.Parameter, lr: float) -> MasterWeights:
    return MasterWeights([([parameter], torch.optim.AdamW, {"lr": lr, "weight_decay": 0.1})])


def test_with_float32_weights_it_is_the_optimizer_it_wraps() -> None:
    start = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    wrapped, plain = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    take_steps(master_adamw(wrapped, 0.01), wrapped, 20, 1.0)
    take_steps(torch.optim.AdamW([plain], lr=0.01, weight_decay=0.1), plain, 20, 1.0)
    torch.testing.assert_close(wrapped, plain)


def test_steps_too_small_for_bfloat16_add_up() -> None:
    master = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    plain = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    # 1e-4 is less than half a step of bfloat16 at one (2^-8), so the plain weights cannot move.
    take_steps(MasterWeights([([master], torch.optim.SGD, {"lr": 1e-4})]), master, 0, 0.0)
    optimizer = MasterWeights([([master], torch.optim.SGD, {"lr": 1e-4})])
    reference = torch.optim.SGD([plain], lr=1e-4)
    for _ in range(200):
        for parameter, step in ((master, optimizer), (plain, reference)):
            parameter.grad = torch.ones_like(parameter)
            step.step()
    assert torch.equal(plain, torch.ones_like(plain))
    torch.testing.assert_close(master.float(), torch.full((8,), 0.98), atol=2**-8, rtol=0)


def test_a_scheduler_on_it_changes_the_learning_rate_of_the_wrapped_optimizer() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = MasterWeights([([parameter], torch.optim.SGD, {"lr": 1.0})])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for expected in (-1.0, -1.5, -1.75):
        parameter.grad = torch.ones(4)
        optimizer.step()
        scheduler.step()
        torch.testing.assert_close(parameter.detach(), torch.full((4,), expected))


def test_a_restored_optimizer_goes_on_as_the_first_would_have() -> None:
    first = torch.nn.Parameter(torch.linspace(-1, 1, 6).to(torch.bfloat16))
    optimizer = master_adamw(first, 0.003)
    take_steps(optimizer, first, 7, 1.0)
    second = torch.nn.Parameter(first.detach().clone())
    saved = copy.deepcopy(optimizer.state_dict())
    take_steps(optimizer, first, 5, 2.0)

    restored = master_adamw(second, 0.5)
    restored.load_state_dict(saved)
    take_steps(restored, second, 5, 2.0)
    assert torch.equal(first, second)


def test_muon_takes_the_layers_matrices_and_nothing_else(tiny_model: LlamaForCausalLM) -> None:
    optimizer = build_optimizer(tiny_model, Training(learning_rate=1e-3, matrix_learning_rate=2e-3))
    names = {id(parameter): name for name, parameter in tiny_model.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups]
    assert [group["lr"] for group in optimizer.param_groups] == [2e-3, 1e-3, 1e-3]
    assert groups[0] == {name for name in names.values() if "_proj" in name}
    assert groups[1] == {"model.embed_tokens.weight"}
    assert groups[2] == {name for name in names.values() if "norm" in name}


def test_muon_takes_the_matrices_of_both_stacks_and_not_their_biases_by_position(
    tiny_t5: T5ForConditionalGeneration,
) -> None:
    optimizer = build_optimizer(tiny_t5, Training(matrix_learning_rate=2e-3))
    names = {id(parameter): name for name, parameter in tiny_t5.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups]
    endings = (".q.weight", ".k.weight", ".v.weight", ".o.weight", ".wi.weight", ".wo.weight")
    assert groups[0] == {name for name in names.values() if name.endswith(endings)}
    biases = {
        f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        for stack in ("encoder", "decoder")
    }
    assert groups[1] == {"shared.weight", *biases}


def test_without_a_matrix_learning_rate_adamw_takes_everything(tiny_model: LlamaForCausalLM) -> None:
    optimizer = build_optimizer(tiny_model, Training(matrix_learning_rate=0.0))
    assert len(optimizer.param_groups) == 2
    trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert trained == sum(p.numel() for p in tiny_model.parameters())
