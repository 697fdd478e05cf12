"""Makes gguf_golden.json and gguf_golden_t5.json: what llama.cpp's own converter writes for the tiny checkpoints of
tests/exporters/tiny.py and tiny_t5.py.

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36 && tar xf llama_cpp_python-0.3.36.tar.gz
    python -m tests.oracles.gguf_golden llama_cpp_python-0.3.36/vendor/llama.cpp

(it also wants `pip install sentencepiece`). Kept: for every tensor its type, shape and the sha256 of its
data; all keys of the header. The converter recognises a tokenizer by a hash over known ones, so it is told
the pre type; everything else is its own doing. It reads a T5's tokenizer from a SentencePiece file alone and is told
that there is none.
"""

import hashlib
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.exporters.tiny import CASES, Case, make_checkpoint
from tests.exporters.tiny_t5 import T5_CASES, T5Case, make_t5

GOLDEN = Path(__file__).with_name("gguf_golden.json")
GOLDEN_T5 = Path(__file__).with_name("gguf_golden_t5.json")
T5_NAMES = ("t5", "flan-t5", "codet5")
# Of the folder and of its reader, not of the model.
_LEFT_OUT = (
    "GGUF.",
    "general.name",
    "general.size_label",
    "general.basename",
    "general.finetune",
    "general.version",
)


def convert(converter: Path, case: Case | T5Case, float_type: str, folder: Path) -> dict[str, Any]:
    """What the converter writes for a case, described."""
    sys.path[:0] = [
        str(converter),
        str(converter / "gguf-py"),
    ]  # it needs the gguf package that lies beside it
    import gguf
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    is_t5 = isinstance(case, T5Case)
    checkpoint = (make_t5 if is_t5 else make_checkpoint)(folder / "checkpoint", case)
    target = folder / "converted.gguf"
    file_type = getattr(
        gguf.LlamaFileType, "ALL_F32" if float_type == "f32" else f"MOSTLY_{float_type.upper()}"
    )
    with torch.inference_mode():
        parameters = ModelBase.load_hparams(checkpoint, False)
        model_class = get_model_class(get_model_architecture(parameters, ModelType.TEXT))
        if is_t5:
            model_class.set_vocab = lambda self: self.gguf_writer.add_tokenizer_model("none")
        else:
            model_class.get_vocab_base_pre = lambda _self, _tokenizer: case.pre
        model_class(checkpoint, file_type, target).write()
    return describe(target)


def describe(path: Path) -> dict[str, Any]:
    """Tensors and keys of a GGUF, tensor data and long lists as hashes."""
    import gguf

    reader = gguf.GGUFReader(path)
    tensors = {
        tensor.name: [
            tensor.tensor_type.name,
            [int(size) for size in tensor.shape],
            _sha256(tensor.data.tobytes()),
        ]
        for tensor in reader.tensors
    }
    keys = {
        key: _short(field.contents()) for key, field in reader.fields.items() if not key.startswith(_LEFT_OUT)
    }
    return {"tensors": tensors, "keys": keys}


def _short(value: Any) -> Any:
    return _sha256(json.dumps(value).encode()) if isinstance(value, list) else value


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def main(converter: Path) -> None:
    """Writes the golden file."""
    logging.disable(logging.WARNING)
    golden = {}
    for name, case in CASES.items():
        for float_type in ("f32", "f16", "bf16") if name in ("llama", "llama-bf16") else ("f32",):
            with tempfile.TemporaryDirectory() as folder:
                golden[f"{name}/{float_type}"] = convert(converter, case, float_type, Path(folder))
    _write(GOLDEN, golden)
    t5 = {}
    for name in T5_NAMES:
        with tempfile.TemporaryDirectory() as folder:
            t5[f"{name}/f32"] = convert(converter, T5_CASES[name], "f32", Path(folder))
    _write(GOLDEN_T5, t5)


def _write(file: Path, golden: dict[str, Any]) -> None:
    lines = (f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in golden.items())
    file.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
