"""Tiny random checkpoints of every supported architecture, the same to the last bit wherever they are
made."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

_MERGES = "t h|th e|i n|Ġ th|Ġ a|r e|e r|o n|Ġ s|Ġ t|a t|e n|o r|Ġth e|Ġ f|d e|de f|Ġ =|s e|se l|sel f|( )"
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {"llama-bpe": _CASELESS + r"\p{N}{1,3}" + _REST, "qwen2": _CASELESS + r"\p{N}" + _REST}
VOCAB_SIZE = 320


@dataclass(frozen=True)
class Case:
    """One checkpoint: its class, configuration beside the common one, its tokenizer's pre type, size of its
    weights."""

    architecture: str
    config: Mapping[str, object] = field(default_factory=dict)
    pre: str = "gpt-2"
    dtype: torch.dtype = torch.float32
    scale: float = 1.5


def _rope(**parameters: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


_LLAMA3 = _rope(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
_YARN = _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
CASES = {
    "llama": Case("LlamaForCausalLM"),
    "llama-bf16": Case("LlamaForCausalLM", dtype=torch.bfloat16),
    "llama-untied": Case("LlamaForCausalLM", {"tie_word_embeddings": False}),
    "llama-3": Case("LlamaForCausalLM", {**_LLAMA3, "tie_word_embeddings": False}, "llama-bpe"),
    "llama-biases": Case("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": Case("LlamaForCausalLM", _rope(rope_type="linear", factor=2.0)),
    "llama-yarn": Case("LlamaForCausalLM", _YARN),
    "mistral": Case("MistralForCausalLM", {"tie_word_embeddings": False, "sliding_window": None}),
    "smollm": Case("LlamaForCausalLM", {"rms_norm_eps": 1e-5}, "smollm"),
    "smollm-3": Case("SmolLM3ForCausalLM", {"num_hidden_layers": 8}, "llama-bpe"),
    "qwen-2": Case("Qwen2ForCausalLM", pre="qwen2"),
    "qwen-3": Case("Qwen3ForCausalLM", {"tie_word_embeddings": False}, "qwen2"),
}


# Layers that add little, so that a few bits per weight are enough, as in a trained model.
GENTLE = Case("LlamaForCausalLM", scale=0.4)


def make_checkpoint(folder: Path, case: Case, seed: int = 0) -> Path:
    """Write a checkpoint: transformers' own folder with random weights that do not depend on torch's
    generator."""
    config = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        **_rope(rope_type="default"),
        **case.config,
    }
    model_class = getattr(transformers, case.architecture)
    model = model_class(model_class.config_class(**config))
    random = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            scale = 0.1 if parameter.ndim == 1 else case.scale / np.sqrt(parameter.shape[-1])
            values = scale * random.standard_normal(tuple(parameter.shape), np.float32)
            parameter.copy_(torch.from_numpy(values) + (1.0 if "norm" in name else 0.0))
    model.to(case.dtype).save_pretrained(folder)
    make_tokenizer(case.pre).save(str(folder / "tokenizer.json"))
    specials = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **specials,
        "chat_template": "{{ messages[0].content }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def make_tokenizer(pre: str) -> Tokenizer:
    """A byte-level BPE with a handful of merges; Llama 3's puts the beginning-of-text token in front."""
    merges = [tuple(merge.split()) for merge in _MERGES.split("|")]
    texts = [
        "<|endoftext|>",
        "<|pad|>",
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *("".join(m) for m in merges),
    ]
    vocab = {text: index for index, text in enumerate(texts)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    if pre in SPLITS:
        steps = [
            pre_tokenizers.Split(Regex(SPLITS[pre]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    elif pre == "smollm":
        steps = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts[:2]])
    tokenizer.add_tokens([AddedToken("<|user|>", special=False), AddedToken("<tool>", special=False)])
    if pre == "llama-bpe":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A",
            pair="<|endoftext|> $A <|endoftext|> $B",
            special_tokens=[("<|endoftext|>", 0)],
        )
    return tokenizer
