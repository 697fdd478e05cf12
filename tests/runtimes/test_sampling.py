"""The sampler against transformers' logits processors, and its draws against their distribution."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from skipstone.errors import UsageError
from skipstone.runtimes.sampling import Sampler, SamplingConfig, draw, likeliest
from tests.runtimes.chi_square import goodness_of_fit

VOCAB = 40


@st.composite
def configs(draw_: st.DrawFn) -> SamplingConfig:
    return SamplingConfig(
        temperature=draw_(st.sampled_from([0.3, 0.8, 1.0, 1.7])),
        top_k=draw_(st.sampled_from([0, 1, 5, 39, 40, 100])),
        top_p=draw_(st.sampled_from([0.1, 0.5, 0.9, 1.0])),
        min_p=draw_(st.sampled_from([0.0, 0.05, 0.5])),
        repetition_penalty=draw_(st.sampled_from([1.0, 1.3, 0.7])),
    )


@cache
def any_model() -> Any:
    """Only its choice of processors is used."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB, num_attention_heads=1, num_key_value_heads=1, **shape)
    )


def by_transformers(
    logits: NDArray[np.float32], history: list[int], config: SamplingConfig
) -> NDArray[np.float64]:
    """The distribution `generate` of transformers would draw from, by its own processors in its own order."""
    import torch
    from transformers import GenerationConfig

    wanted = GenerationConfig(
        do_sample=True,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
    )
    processors = any_model()._get_logits_processor(
        generation_config=wanted, input_ids_seq_length=len(history), device="cpu"
    )
    ids = torch.tensor([history], dtype=torch.long)
    scores = processors(ids, torch.from_numpy(logits[None].astype(np.float64)))
    return np.asarray(torch.softmax(scores[0], -1).numpy(), np.float64)


@given(
    config=configs(),
    seed=st.integers(0, 10_000),
    shift=st.sampled_from([-8.0, 0.0, 8.0]),
    history=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12),
)
@settings(max_examples=60, deadline=None)
def test_the_distribution_is_that_of_transformers(
    config: SamplingConfig, seed: int, shift: float, history: list[int]
) -> None:
    logits = (3.0 * np.random.default_rng(seed).standard_normal(VOCAB) + shift).astype(np.float32)
    found = Sampler(config).distribution(logits, history)
    np.testing.assert_allclose(found, by_transformers(logits, history, config), atol=1e-6)


@given(
    config=configs(), seed=st.integers(0, 10_000), history=st.lists(st.integers(0, VOCAB - 1), max_size=12)
)
def test_a_part_of_the_vocabulary_has_the_distribution_of_the_whole_with_the_rest_left_out(
    config: SamplingConfig, seed: int, history: list[int]
) -> None:
    rng = np.random.default_rng(seed)
    logits = (3.0 * rng.standard_normal(VOCAB)).astype(np.float32)
    ids = np.sort(rng.permutation(VOCAB)[:25]).astype(np.int32)
    rest_left_out = np.full(VOCAB, -1e9, np.float32)
    rest_left_out[ids] = logits[ids]
    sampler = Sampler(config)
    sparse = sampler.sparse(logits[ids], ids, history)
    np.testing.assert_array_equal(sparse.ids, ids)
    if config.repetition_penalty >= 1.0:  # a penalty below 1 lifts the tokens left out here
        whole = sampler.distribution(rest_left_out, history)
        np.testing.assert_allclose(sparse.probs, whole[ids], atol=1e-9)
    assert sparse.probs.sum() == pytest.approx(1.0)


def test_temperature_zero_puts_all_mass_on_the_best_token_after_the_penalty() -> None:
    logits = np.array([1.0, 3.0, 2.9, -1.0], np.float32)
    sampler = Sampler(SamplingConfig(temperature=0.0, repetition_penalty=1.5))
    assert sampler.best(logits) == 1
    assert sampler.best(logits, [1]) == 2
    np.testing.assert_array_equal(sampler.distribution(logits, [1]), [0, 0, 1, 0])


def test_the_penalty_does_not_change_the_logits_it_is_given() -> None:
    logits = np.array([1.0, 3.0, -2.0], np.float32)
    Sampler(SamplingConfig(temperature=1.0, repetition_penalty=2.0)).distribution(logits, [1, 2])
    np.testing.assert_array_equal(logits, np.array([1.0, 3.0, -2.0], np.float32))


def test_draws_have_the_distribution_they_are_drawn_from() -> None:
    p = np.array([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    rng = np.random.default_rng(0)
    found = Counter(draw(p, rng) for _ in range(20_000))
    assert goodness_of_fit(found, dict(enumerate(p))) > 1e-3
    assert goodness_of_fit(found, dict(enumerate([0.0, 0.45, 0.0, 0.35, 0.2, 0.0]))) < 1e-9


class AlmostOne(np.random.Generator):
    """The largest number a generator gives."""

    def __init__(self, value: float) -> None:
        super().__init__(np.random.PCG64(0))
        self.value = value

    def random(self, *_args: object, **_kwargs: object) -> float:  # type: ignore[override]
        return self.value


@given(
    weights=st.lists(st.sampled_from([0.0, 1e-300, 1e-17, 0.1, 1.0]), min_size=1, max_size=8).filter(any),
    value=st.sampled_from([0.0, 0.5, np.nextafter(1.0, 0.0)]),
)
def test_a_token_of_probability_zero_is_never_drawn(weights: list[float], value: float) -> None:
    p = np.array(weights) / sum(weights)
    if p.any():
        assert p[draw(p, AlmostOne(value))] > 0


@given(
    logits=st.integers(1, 12).flatmap(
        lambda size: st.lists(
            st.lists(st.integers(-3, 3), min_size=size, max_size=size), min_size=1, max_size=4
        )
    ),
    count=st.integers(1, 15),
)
def test_the_likeliest_tokens_are_the_first_of_a_stable_sort(logits: list[list[int]], count: int) -> None:
    expected = [sorted(range(len(row)), key=lambda at, row=row: -row[at])[:count] for row in logits]  # type: ignore[misc]
    assert likeliest(np.array(logits, np.float32), count).tolist() == expected


def test_a_seed_reproduces_draws_and_no_seed_does_not() -> None:
    p = np.full(1000, 1e-3)

    def texts(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingConfig(temperature=1.0, seed=seed))
        return [sampler.draw(p) for _ in range(20)]

    assert texts(7) == texts(7)
    assert texts(7) != texts(8)
    assert texts(None) != texts(None)


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("temperature", [-0.1, float("nan"), float("inf")]),
        ("top_k", [-1]),
        ("top_p", [0.0, -0.5, 1.01, float("nan")]),
        ("min_p", [-0.1, 1.0, float("nan")]),
        ("repetition_penalty", [0.0, -1.0, float("inf"), float("nan")]),
        ("seed", [-1]),
    ],
)
def test_values_that_mean_nothing_are_refused_by_flag_and_value(flag: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(UsageError, match=f"--{flag.replace('_', '-')} {value}"):
            SamplingConfig(**{flag: value})
