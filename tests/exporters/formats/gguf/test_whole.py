"""A checkpoint as one GGUF, against what llama.cpp's own converter writes."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from skipstone.errors import CheckpointError
from skipstone.exporters.checkpoint import open_checkpoint
from skipstone.exporters.formats.gguf.vocabulary import tokenizer_keys
from skipstone.exporters.formats.gguf.whole import native_float_type, write_whole
from tests.exporters.conftest import MakeTiny
from tests.exporters.tiny import VOCAB_SIZE
from tests.oracles.gguf_golden import GOLDEN, describe

_CONVERTED = json.loads(GOLDEN.read_text(encoding="utf-8"))
# The converter takes the separator from the template for pairs of texts, which no decoder is given.
_SEPARATOR = {"tokenizer.ggml.seperator_token_id", "tokenizer.ggml.add_sep_token"}
# Written for every architecture here, for some only there.
_MORE = {"tokenizer.ggml.add_bos_token"}


@pytest.mark.parametrize("name", list(_CONVERTED))
def test_every_tensor_and_key_is_what_llama_cpps_converter_writes(
    name: str, tiny: MakeTiny, tmp_path: Path
) -> None:
    case, float_type = name.split("/")
    checkpoint = open_checkpoint(tiny(case))
    tokenizer = tokenizer_keys(checkpoint, VOCAB_SIZE)
    write_whole(checkpoint, tmp_path / "whole.gguf", float_type, tokenizer=tokenizer)
    ours, theirs = describe(tmp_path / "whole.gguf"), _CONVERTED[name]
    assert ours["tensors"] == theirs["tensors"]
    arch = theirs["keys"]["general.architecture"]
    more = _MORE | {f"{arch}.vocab_size", f"{arch}.rope.dimension_count"}
    common = {key: value for key, value in ours["keys"].items() if key not in more - theirs["keys"].keys()}
    assert common == {key: value for key, value in theirs["keys"].items() if key not in _SEPARATOR}


def test_a_checkpoint_split_over_two_files_is_written_as_from_one(tiny: MakeTiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("llama"), tmp_path / "sharded")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for shard, half in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: tensors[name] for name in half}, folder / shard)
        weight_map |= dict.fromkeys(half, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for source, target in ((tiny("llama"), "one.gguf"), (folder, "two.gguf")):
        write_whole(open_checkpoint(source), tmp_path / target, "f32")
    one, two = (describe(tmp_path / name)["tensors"] for name in ("one.gguf", "two.gguf"))
    assert one == two


@pytest.mark.parametrize(("name", "expected"), [("llama", "f32"), ("llama-bf16", "bf16")])
def test_the_native_float_type_loses_nothing(
    name: str, expected: str, tiny: MakeTiny, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny(name))
    assert native_float_type(checkpoint) == expected
    write_whole(checkpoint, tmp_path / "native.gguf", expected)
    down = checkpoint.tensor("model.layers.1.mlp.down_proj.weight")
    raw = down.contiguous().view(torch.uint8).numpy().tobytes()
    written = describe(tmp_path / "native.gguf")["tensors"]["blk.1.ffn_down.weight"]
    assert written[2] == hashlib.sha256(raw).hexdigest()


def test_a_tensor_that_the_mapping_does_not_know_is_refused_by_name(tiny: MakeTiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("mistral"), tmp_path / "odd")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, folder / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"self_attn\.q_proj\.bias"):
        write_whole(open_checkpoint(folder), tmp_path / "whole.gguf", "f32")


def test_a_tensor_of_another_shape_than_the_configuration_says_is_refused(
    tiny: MakeTiny, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny("llama"), tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(CheckpointError, match=r"gate_proj.*\[96, 64\].*\[128, 64\]"):
        write_whole(open_checkpoint(folder), tmp_path / "whole.gguf", "f32")
