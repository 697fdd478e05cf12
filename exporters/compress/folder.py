"""A compressed model on disk: an ordinary checkpoint folder, what was fixed of its weights, and what was done to it.

| file | holds |
|---|---|
| `model.safetensors`, `config.json`, tokenizer | what transformers loads |
| `exits.json`, draft material, lexicon | what exporters look for beside a checkpoint |
| `quantization.json`, `codes.safetensors` | the weights whose codes are fixed: layout and codes, if there are any |
| `factors.safetensors` | the two matrices of every layer that was factored, if any (`skipstone.exporters.factors`) |
| `compression.json` | `skipstone.bundle.Compression` |
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipstone.bundle import Compression, ModelSize, hash_file
from skipstone.errors import CheckpointError
from skipstone.exporters.checkpoint import quiet_loading
from skipstone.exporters.compress.record import QUANTIZATION_FILE, has_codes, write_record
from skipstone.exporters.compress.work import Codes, FixedCodes, Work
from skipstone.exporters.exits import CONFIG_KEY, ENCODER_CONFIG_KEY, EXITS_FILE
from skipstone.exporters.factors import factored, whole_state, write_factors

CODES_FILE = "codes.safetensors"
_CARRIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "generation_config.json",
    "token_frequencies.json", "draft-table.npz", "lexicon.json",
)  # fmt: skip
_BETWEEN = ":"  # of a weight's name and a part's, in codes.safetensors


def write_folder(model: Any, work: Work, record: Compression, folder: Path) -> None:
    """Write a model and what belongs to it into a folder that exists and is empty.

    The weights are stored in the source's type where that loses nothing, else in float32.

    Raises:
        OSError: the disk refuses.
    """
    for name in _CARRIED:
        if (work.source / name).is_file():
            shutil.copyfile(work.source / name, folder / name)
    _write_model(model, work, folder)
    _write_exits(work, folder)
    if work.codes:
        _write_codes(work, folder)
    write_factors(model, folder)
    write_record(record, folder)


def read_codes(folder: Path) -> FixedCodes | None:
    """The codes that a checkpoint's weights have; None where none are fixed.

    Raises:
        CheckpointError: the files are damaged or one is missing.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not has_codes(folder):
        return None
    try:
        listed = json.loads((folder / QUANTIZATION_FILE).read_text(encoding="utf-8"))
        stored = load_file(folder / CODES_FILE)
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in listed["weights"]}
        for key, tensor in stored.items():
            name, _, part = key.rpartition(_BETWEEN)
            parts[name][part] = tensor
        weights = {
            name: Codes(str(entry["grid"]), parts[name], int(entry["num_bytes"]))
            for name, entry in listed["weights"].items()
        }
        hashes = "".join(hash_file(folder / name) for name in (QUANTIZATION_FILE, CODES_FILE))
        sha256 = hashlib.sha256(hashes.encode()).hexdigest()
        return FixedCodes(str(listed["scheme"]), dict(listed["tables"]), weights, sha256)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: {QUANTIZATION_FILE} and {CODES_FILE} do not fit together: {error}",
            hint="compress the checkpoint again, or remove both to export its float weights",
        ) from error


def measure_size(model: Any, work: Work) -> ModelSize:
    """Weights and bytes of a model as `write_folder` would store it, codes in their layouts; of factored layers both
    matrices, and not their product.
    """
    width = _stored_type(model, work).itemsize
    weights = dict(model.named_parameters())  # each shared one once
    num_bytes = sum(
        work.codes[name].num_bytes if name in work.codes else weight.numel() * width
        for name, weight in weights.items()
    )
    return ModelSize(
        parameters=sum(weight.numel() for weight in weights.values()),
        nonzero=sum(int(weight.count_nonzero()) for weight in weights.values()),
        num_bytes=num_bytes,
    )


def _write_model(model: Any, work: Work, folder: Path) -> None:
    dtype = _stored_type(model, work)
    converted: dict[int, Tensor] = {}  # what is shared stays shared, and is then stored once
    whole = whole_state(model)
    state = {
        name: converted.setdefault(tensor.data_ptr(), tensor.to(dtype)) for name, tensor in whole.items()
    }
    for key, exits in ((CONFIG_KEY, work.exits), (ENCODER_CONFIG_KEY, work.encoder_exits)):
        if hasattr(model.config, key):
            setattr(model.config, key, None if exits is None else list(exits))
    with quiet_loading():
        model.save_pretrained(folder, state_dict=state)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _stored_type(model: Any, work: Work) -> torch.dtype:
    """The source's type if every weight is exact in it, else float32, which products of factors are not exact below."""
    from transformers import AutoConfig

    dtype = AutoConfig.from_pretrained(work.source).dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if (
        dtype is None
        or factored(model)
        or not all(weight.equal(weight.to(dtype).float()) for weight in model.parameters())
    ):
        return torch.float32
    return dtype  # type: ignore[no-any-return]


def _write_exits(work: Work, folder: Path) -> None:
    named = {"exits": work.exits, "encoder_exits": work.encoder_exits}
    found = {key: list(exits) for key, exits in named.items() if exits is not None}
    if "exits" in found:
        (folder / EXITS_FILE).write_text(json.dumps(found) + "\n", encoding="utf-8")


def _write_codes(work: Work, folder: Path) -> None:
    from safetensors.torch import save_file

    codes = work.codes
    listed = {
        "scheme": work.scheme,
        "tables": work.tables,
        "weights": {
            name: {"grid": entry.grid, "num_bytes": entry.num_bytes} for name, entry in codes.items()
        },
    }
    (folder / QUANTIZATION_FILE).write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    stored = {
        f"{name}{_BETWEEN}{part}": tensor.contiguous()
        for name, entry in codes.items()
        for part, tensor in entry.parts.items()
    }
    save_file(stored, folder / CODES_FILE)
