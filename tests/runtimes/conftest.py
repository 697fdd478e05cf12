"""Tiny random models, exported once per run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from skipstone.bundle import Bundle, open_bundle
from tests.once import once

VOCAB = 320


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE trained on a few lines, so that any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [
        "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n",
        "for line in lines: print(line)\n",
    ]
    tokenizer.train_from_iterator(lines * 8, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}'
    )


def write_checkpoint(folder: Path, config: Any) -> Path:
    """A random model whose logits have some spread, in the standard layout."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(0.0, 1.0 if "embed" in name else 1.4 / weight.shape[1] ** 0.5)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def _shape() -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with 4 layers."""
    from transformers import LlamaConfig

    return write_checkpoint(tmp_path_factory.mktemp("tiny-llama"), LlamaConfig(**_shape()))


@pytest.fixture(scope="session")
def tiny_qwen_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 with 4 layers: its q and k norms need the callback to read hidden states."""
    from transformers import Qwen3Config

    return write_checkpoint(tmp_path_factory.mktemp("tiny-qwen3"), Qwen3Config(**_shape(), head_dim=16))


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The Llama as an f32 bundle with exits 1 and 2 and a draft head of 128 rows."""
    return _export(tiny_checkpoint, tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_qwen_bundle(tiny_qwen_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The Qwen3 as an f32 bundle with exits 1 and 2 and a draft head of 128 rows."""
    return _export(tiny_qwen_checkpoint, tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_executorch_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The Llama as an ExecuTorch bundle, cut alike."""
    return _export(tiny_checkpoint, tmp_path_factory, "executorch")


@pytest.fixture(scope="session")
def tiny_qwen_executorch_bundle(
    tiny_qwen_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """The Qwen3 as an ExecuTorch bundle, cut alike."""
    return _export(tiny_qwen_checkpoint, tmp_path_factory, "executorch")


@pytest.fixture(scope="session")
def tiny_onnx_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The Llama as an ONNX bundle, cut alike."""
    return _export(tiny_checkpoint, tmp_path_factory, "onnx")


@pytest.fixture(scope="session")
def tiny_qwen_onnx_bundle(tiny_qwen_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The Qwen3 as an ONNX bundle, cut alike."""
    return _export(tiny_qwen_checkpoint, tmp_path_factory, "onnx")


@pytest.fixture(scope="session")
def tiny_narrow_onnx_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The Llama as ONNX graphs of 1, 4 and 16 rows and 256 slots each, as NPUs want them, run by the CPU."""
    from skipstone.exporters.formats.onnx.files import write_graph
    from skipstone.exporters.formats.onnx.graphs import fixed
    from skipstone.exporters.formats.onnx.targets import TARGETS, Target, Task, Written

    def write(graphs: Any, task: Task) -> Written:
        entries = [
            write_graph(fixed(graph, width, task.reading.facts.context_length), part, width, task.folder)
            for part, graph in graphs
            for width in task.target.widths
        ]
        return Written(tuple(entries))

    narrow = Target("cpu", ("none",), write, (1, 4, 16), 16, 256, TARGETS["cpu"].masked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TARGETS, "cpu", narrow)
        return _export(tiny_checkpoint, tmp_path_factory, "onnx", "narrow-onnx")


def _export(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, format: str = "gguf", kind: str | None = None
) -> Bundle:
    """The bundle, made once per run; `kind` tells those of one format apart."""

    def export(output: Path) -> None:
        from skipstone.exporters.pipeline import export_checkpoint

        export_checkpoint(
            checkpoint, output, format=format, quantize="none", exits=(1, 2), draft_vocab_size=128
        )

    folder = once(tmp_path_factory, f"{kind or format}/{checkpoint.name}", export)
    return open_bundle(folder, verify_hashes=False)
