"""Write a checkpoint with random weights from the published configuration of a real model.

    python samples/random_weights.py smollm2-135m --output build/smollm2 [--layers 6]

For what does not depend on what a model has learned: that an architecture exports and runs, file sizes, memory,
seconds per token. Its text is noise; what drafting gains on it says nothing.

The configurations are those of the models' config.json files on the Hugging Face hub:

- `llama-3.2-1b`: meta-llama/Llama-3.2-1B (1,235,814,400 parameters)
- `qwen3-0.6b`: Qwen/Qwen3-0.6B (596,049,920 parameters)
- `smollm2-135m`: HuggingFaceTB/SmolLM2-135M (134,515,008 parameters)
- `t5-small`: google-t5/t5-small (60,506,624 parameters)
- `flan-t5-small`: google/flan-t5-small (76,961,152 parameters)
- `codet5-small`: Salesforce/codet5-small (60,492,288 parameters)

Weights are drawn as transformers initialises them, in bfloat16, from a fixed seed. `--layers` cuts the model down to
its first layers, an encoder-decoder on both sides. Such a model prefers no token by much, so that rounding its
weights to few bits changes the best one nearly everywhere, and an export in 4 bits rightly fails its self-test.
`--residual-scale 0.02` multiplies what the layers add to the residual stream: the model then repeats the token it
reads, as clearly as a trained one says something, at the same cost.

The tokenizer is that of another checkpoint, the shipped one by default: it knows fewer tokens than the model, as with
the padded vocabularies of many models, and a token it does not know decodes to nothing.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from skipstone.runtimes.quiet import quiet_libraries

with quiet_libraries():  # transformers loads what quantisers it finds, and those write what they lack
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        LlamaConfig,
        PretrainedConfig,
        PreTrainedModel,
        Qwen3Config,
        T5Config,
    )

from skipstone.errors import CheckpointError, ExportError, SkipstoneError, UsageError
from skipstone.exporters.checkpoint import quiet_loading

CODER = Path(__file__).resolve().parent / "models" / "coder"
_OUTPUTS = (
    "self_attn.o_proj.weight",
    "mlp.down_proj.weight",
    "Attention.o.weight",
    "DenseReluDense.wo.weight",
)
_TOKENIZER = "tokenizer.json"
_TOKENIZER_FILES = (_TOKENIZER, "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Shape:
    """A published model: its number of layers, and its configuration with so many of them."""

    layers: int
    config: Callable[[int], PretrainedConfig]


def _llama_3_2_1b(layers: int) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        rms_norm_eps=1e-5,
        initializer_range=0.02,
        tie_word_embeddings=True,
        bos_token_id=128000,
        eos_token_id=128001,
    )


def _qwen3_0_6b(layers: int) -> Qwen3Config:
    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        rms_norm_eps=1e-6,
        initializer_range=0.02,
        tie_word_embeddings=True,
        bos_token_id=151643,
        eos_token_id=151645,
    )


def _smollm2_135m(layers: int) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        rms_norm_eps=1e-5,
        initializer_range=1 / 24,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


def _t5_small(layers: int) -> T5Config:
    return T5Config(
        architectures=["T5ForConditionalGeneration"],
        vocab_size=32128,
        d_model=512,
        d_kv=64,
        d_ff=2048,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=8,
        n_positions=512,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )


def _flan_t5_small(layers: int) -> T5Config:
    return T5Config(
        architectures=["T5ForConditionalGeneration"],
        vocab_size=32128,
        d_model=512,
        d_kv=64,
        d_ff=1024,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=6,
        n_positions=512,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )


def _codet5_small(layers: int) -> T5Config:
    return T5Config(
        architectures=["T5ForConditionalGeneration"],
        vocab_size=32100,
        d_model=512,
        d_kv=64,
        d_ff=2048,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=8,
        n_positions=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=0,
    )


SHAPES = {
    "llama-3.2-1b": Shape(16, _llama_3_2_1b),
    "qwen3-0.6b": Shape(28, _qwen3_0_6b),
    "smollm2-135m": Shape(30, _smollm2_135m),
    "t5-small": Shape(6, _t5_small),
    "flan-t5-small": Shape(8, _flan_t5_small),
    "codet5-small": Shape(6, _codet5_small),
}


def published_config(name: str, layers: int | None = None) -> PretrainedConfig:
    """Configuration of one of `SHAPES`, cut to its first `layers` layers (None: all).

    Raises:
        UsageError: an unknown name, or layers that the model does not have.
    """
    if name not in SHAPES:
        raise UsageError(f"{name}: unknown shape", hint=f"known: {', '.join(SHAPES)}")
    shape = SHAPES[name]
    count = shape.layers if layers is None else layers
    if not 1 <= count <= shape.layers:
        raise UsageError(f"--layers {count}: {name} has 1 to {shape.layers}")
    return shape.config(count)


def write_random(
    config: PretrainedConfig, tokenizer: Path, output: Path, seed: int = 0, residual_scale: float = 1.0
) -> int:
    """Write a checkpoint with random weights.

    Args:
        config: of the model.
        tokenizer: checkpoint folder whose tokenizer is taken.
        output: folder to write; it must not exist.
        seed: of the weights.
        residual_scale: factor of the layers' output projections.

    Returns:
        Number of parameters, tied ones once.

    Raises:
        CheckpointError: the tokenizer is missing, or knows tokens that the model does not have.
        ExportError: `output` exists.
    """
    _check_tokenizer(tokenizer / _TOKENIZER, config.vocab_size)
    if output.exists():
        raise ExportError(f"{output}: exists already", hint="remove it or choose another --output folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        draft = Path(folder) / output.name
        draft.mkdir()
        with torch.random.fork_rng(devices=()), quiet_libraries():
            torch.manual_seed(seed)
            model = random_model(config)
        _scale(model, residual_scale)
        with quiet_loading():
            model.save_pretrained(draft)
        for name in _TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copy(tokenizer / name, draft / name)
        draft.rename(output)
    return sum(parameter.numel() for parameter in model.parameters())


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model with random weights in bfloat16; transformers ties every T5's head, Flan-T5's is its own."""
    if not config.is_encoder_decoder:
        decoder: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        return decoder
    model: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.bfloat16)
    if not config.scale_decoder_outputs:
        head = torch.empty_like(model.get_input_embeddings().weight)
        model.get_output_embeddings().weight = torch.nn.Parameter(
            head.normal_(0.0, config.initializer_factor)
        )
    return model


def _scale(model: torch.nn.Module, factor: float) -> None:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(_OUTPUTS):
                weight.mul_(factor)


def _check_tokenizer(file: Path, vocab_size: int) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file}: not found", hint="pass a checkpoint folder with --tokenizer")
    try:
        largest = max(Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True).values(), default=0)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise CheckpointError(f"{file}: not a readable tokenizer: {error}") from error
    if largest >= vocab_size:
        raise CheckpointError(
            f"{file}: gives token {largest}, the model's vocabulary has {vocab_size}",
            hint="pass a smaller tokenizer with --tokenizer",
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, help="keep the first so many (default: all)")
    parser.add_argument("--tokenizer", type=Path, default=CODER, help="checkpoint folder to take it from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--residual-scale", type=float, default=1.0, help="factor of the layers' outputs")
    options = parser.parse_args(arguments)
    try:
        config = published_config(options.shape, options.layers)
        count = write_random(config, options.tokenizer, options.output, options.seed, options.residual_scale)
    except SkipstoneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    layers = f"{config.num_hidden_layers} of {SHAPES[options.shape].layers} layers"
    print(f"{options.output}: {options.shape}, {layers}, {count:,} random parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
