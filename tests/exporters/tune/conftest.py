"""A tiny Llama, a tiny T5 and small texts for the tests of tuning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

LAYERS = 4

TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}


TINY_T5 = {
    "vocab_size": 300,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 4,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}


@pytest.fixture
def tiny_model() -> LlamaForCausalLM:
    """A random float32 Llama of 4 layers whose weights are large enough for the exits to differ."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model


@pytest.fixture
def tokens() -> torch.Tensor:
    """Random token ids, int64 [3, 40]."""
    return torch.randint(0, TINY["vocab_size"], (3, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tiny_t5() -> T5ForConditionalGeneration:
    """A random float32 T5 of 4 encoder and 3 decoder layers whose exits differ."""
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(**TINY_T5)).eval()


@pytest.fixture
def pair_batch() -> dict[str, torch.Tensor]:
    """Three pairs of random ids, a source and a target of them shorter than the others."""
    generator = torch.Generator().manual_seed(1)
    sources = torch.randint(2, TINY_T5["vocab_size"], (3, 11), generator=generator)
    labels = torch.randint(2, TINY_T5["vocab_size"], (3, 9), generator=generator)
    mask = torch.ones_like(sources)
    sources[1, 8:], mask[1, 8:], labels[2, 6:] = 0, 0, -100
    return {"input_ids": sources, "attention_mask": mask, "labels": labels}


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """The tiny model's config.json."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**TINY, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return path


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of 40 small, regular texts; with a modulus of 4 some are held out and most are not."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        lines = [f"def f{number}_{i}(x):\n    return x + {i % 7}\n" for i in range(40)]
        (folder / f"{number:02}.py").write_text("\n".join(lines))
    return folder


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """A recipe small enough to learn the texts in some tens of steps."""
    path = tmp_path / "tiny.toml"
    path.write_text(
        """
[corpus]
held_out_modulus = 4

[layerskip]
max_dropout = 0.1
rotation = [[1, 3], [2]]
ramp = 0.5

[training]
sequence_length = 32
batch_size = 8
learning_rate = 1e-2
matrix_learning_rate = 1e-2
warmup_steps = 5
"""
    )
    return path
