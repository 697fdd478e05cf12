from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from skipstone.errors import SkipstoneError
from skipstone.exporters.tune import attention
from skipstone.exporters.tune.objective import LayerSkipNet, scale_residual_projections

NO_DROPOUT = (0.0,) * 4


def oracle_logits(model: LlamaForCausalLM, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Logits after each layer 1 … L from transformers' own forward and `output_hidden_states`."""
    output = model(tokens[:, :-1], output_hidden_states=True)
    early = [model.lm_head(model.model.norm(state)) for state in output.hidden_states[1:-1]]
    return [*early, output.logits]


def cross_entropy(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def test_losses_are_those_of_the_plain_models_hidden_states(
    tiny_model: LlamaForCausalLM, tokens: torch.Tensor
) -> None:
    logits = oracle_logits(tiny_model.eval(), tokens)
    losses = LayerSkipNet(tiny_model, NO_DROPOUT)(tokens, exits=(1, 3))
    torch.testing.assert_close(losses.final, cross_entropy(logits[3], tokens))
    torch.testing.assert_close(
        losses.exits, cross_entropy(logits[0], tokens) + cross_entropy(logits[2], tokens)
    )


def test_distillation_is_the_divergence_from_the_last_layer_plus_its_entropy(
    tiny_model: LlamaForCausalLM, tokens: torch.Tensor
) -> None:
    logits = oracle_logits(tiny_model.eval(), tokens)
    teacher, student = (functional.log_softmax(logits[i], -1).flatten(0, 1) for i in (3, 1))
    divergence = functional.kl_div(student, teacher, log_target=True, reduction="batchmean")
    entropy = -(teacher.exp() * teacher).sum(-1).mean()
    expected = 0.4 * cross_entropy(logits[1], tokens) + 0.6 * (divergence + entropy)
    losses = LayerSkipNet(tiny_model, NO_DROPOUT)(tokens, exits=(2,), distil=0.6)
    torch.testing.assert_close(losses.exits, expected)


def test_the_exits_do_not_teach_the_layers_above_them(
    tiny_model: LlamaForCausalLM, tokens: torch.Tensor
) -> None:
    losses = LayerSkipNet(tiny_model, NO_DROPOUT)(tokens, exits=(2,), distil=1.0)
    losses.exits.backward()
    touched = [layer.mlp.up_proj.weight.grad is not None for layer in tiny_model.model.layers]
    assert touched == [True, True, False, False]


def test_layer_dropout_skips_whole_sequences_in_training_and_nothing_in_evaluation(
    tiny_model: LlamaForCausalLM, tokens: torch.Tensor
) -> None:
    net = LayerSkipNet(tiny_model, (0.0, 0.0, 1.0, 0.0))
    inputs = tokens[:, :-1]
    plain = tiny_model.eval()(inputs, output_hidden_states=True).hidden_states
    with torch.no_grad():
        net.train()
        second, third, _ = net.hidden_states(inputs, exits=(2, 3))
        assert torch.equal(second, third)
        net.eval()
        second, third, _ = net.hidden_states(inputs, exits=(2, 3))
    torch.testing.assert_close(third, plain[3])
    assert not torch.equal(second, third)


def test_layers_are_dropped_as_often_as_their_rate_says(tiny_model: LlamaForCausalLM) -> None:
    torch.manual_seed(0)
    net = LayerSkipNet(tiny_model, (0.0, 0.3, 0.0, 0.0)).train()
    inputs = torch.randint(0, 300, (400, 2))
    with torch.no_grad():
        first, second, _ = net.hidden_states(inputs, exits=(1, 2))
    dropped = (first == second).all(dim=(1, 2)).double().mean().item()
    assert 0.3 - 4 * (0.21 / 400) ** 0.5 < dropped < 0.3 + 4 * (0.21 / 400) ** 0.5


def test_blocked_attention_has_the_values_and_gradients_of_pytorchs(
    tiny_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_BLOCK", 16)  # 39 positions: two whole blocks and a part
    tokens = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(2))
    net = LayerSkipNet(tiny_model, NO_DROPOUT)
    net(tokens, exits=(2,)).final.backward()
    expected = {name: p.grad.clone() for name, p in tiny_model.named_parameters() if p.grad is not None}
    loss = net(tokens).final.detach()
    tiny_model.zero_grad()
    attention.use_for_training(tiny_model)
    blocked = net(tokens).final
    blocked.backward()
    torch.testing.assert_close(blocked.detach(), loss)
    for name, parameter in tiny_model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_blocked_attention_keeps_to_a_sliding_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_BLOCK", 8)
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 20, 8) for heads in (4, 2, 2))
    module = torch.nn.Identity()
    output, _ = attention.blocked_causal_attention(module, query, key, value, None, sliding_window=5)
    distance = torch.arange(20).unsqueeze(1) - torch.arange(20)
    expected = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=(distance >= 0) & (distance < 5), enable_gqa=True
    )
    torch.testing.assert_close(output.transpose(1, 2), expected)


def test_decoders_with_query_and_key_norms_are_tuned_the_same_way(tokens: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=300, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, intermediate_size=64, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
            pad_token_id=1,
        )
    ).eval()  # fmt: skip
    logits = oracle_logits(model, tokens)
    losses = LayerSkipNet(model, (0.0,) * 3)(tokens, exits=(1,))
    torch.testing.assert_close(losses.final, cross_entropy(logits[2], tokens))
    torch.testing.assert_close(losses.exits, cross_entropy(logits[0], tokens))


def test_a_model_without_a_decoders_parts_is_refused_by_name() -> None:
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    )
    with pytest.raises(SkipstoneError, match=r"GPT2LMHeadModel has no model\.embed_tokens"):
        LayerSkipNet(model, (0.0,))


def test_only_projections_into_the_residual_stream_are_scaled_at_the_start(
    tiny_model: LlamaForCausalLM,
) -> None:
    before = {name: p.detach().clone() for name, p in tiny_model.named_parameters()}
    scale_residual_projections(tiny_model)
    for name, parameter in tiny_model.named_parameters():
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        torch.testing.assert_close(parameter.detach(), before[name] * (8**-0.5 if residual else 1.0))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch's compiler warns of its own parts
def test_compiled_parts_give_the_losses_of_uncompiled_ones(
    tiny_model: LlamaForCausalLM, tokens: torch.Tensor
) -> None:
    attention.use_for_training(tiny_model)
    plain = LayerSkipNet(tiny_model, NO_DROPOUT)(tokens, exits=(1, 2), distil=0.5)
    compiled = LayerSkipNet(tiny_model, NO_DROPOUT, compile_parts=True)(tokens, exits=(1, 2), distil=0.5)
    torch.testing.assert_close(compiled.final, plain.final)
    torch.testing.assert_close(compiled.exits, plain.exits)
