"""Tokenizers to GGUF keys and back."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from skipstone.errors import CheckpointError
from skipstone.exporters.checkpoint import open_checkpoint
from skipstone.exporters.formats.gguf.parts import GgufModel, array_part, write_parts
from skipstone.exporters.formats.gguf.vocabulary import adds_bos, tokenizer_from_keys, tokenizer_keys
from tests.exporters.conftest import MakeTiny
from tests.exporters.tiny import VOCAB_SIZE, make_tokenizer

_BY_PRE = {"gpt-2": "llama", "smollm": "smollm", "llama-bpe": "llama-3", "qwen2": "qwen-2"}


@pytest.fixture(scope="module")
def rebuilt(tiny: MakeTiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """Each tokenizer through a GGUF's keys."""
    tokenizers = {}
    for pre, case in _BY_PRE.items():
        path = tmp_path_factory.mktemp("keys") / "keys.gguf"
        keys = tokenizer_keys(open_checkpoint(tiny(case)), VOCAB_SIZE)
        write_parts(path, "llama", keys, [array_part("token_embd.weight", np.zeros((2, 32)))])
        tokenizers[pre] = tokenizer_from_keys(GgufModel(path))
    return tokenizers


@settings(max_examples=60)
@given(text=st.text(st.sampled_from("theinodf \n\t.1234'sé(=<|user>tool🙂")))
@pytest.mark.parametrize("pre", list(_BY_PRE))
def test_a_rebuilt_tokenizer_cuts_every_text_as_the_original(
    pre: str, text: str, rebuilt: dict[str, Tokenizer]
) -> None:
    ids = make_tokenizer(pre).encode(text).ids
    assert rebuilt[pre].encode(text).ids == ids
    assert rebuilt[pre].decode(ids) == make_tokenizer(pre).decode(ids)


@pytest.mark.parametrize(("pre", "expected"), [("gpt-2", False), ("llama-bpe", True)])
def test_only_a_tokenizer_that_puts_the_first_token_in_front_adds_it(pre: str, expected: bool) -> None:
    assert adds_bos(make_tokenizer(pre), 0) is expected
    assert adds_bos(make_tokenizer(pre), None) is False


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
        ({"model": {"type": "Unigram", "vocab": []}}, "Unigram"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Split", "pattern": {"Regex": r"\d+"}, "behavior": "Isolated"},
                        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
                    ],
                }
            },
            "matches none of gpt-2, smollm, llama-bpe, qwen2",
        ),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_refused(
    edit: dict[str, object], message: str, tiny: MakeTiny, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny("llama"), tmp_path / "odd")
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(content | edit), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        tokenizer_keys(open_checkpoint(folder), VOCAB_SIZE)
