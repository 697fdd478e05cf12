"""Tokenizers between their two forms: tokenizer.json (tokenizers library) and GGUF keys.

A bundle carries tokenizer.json, whatever the input was; the GGUF keys are written into whole GGUF files only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models

from skipstone.errors import CheckpointError
from skipstone.exporters.checkpoint import Checkpoint
from skipstone.exporters.facts import adds_bos, chat_template_of
from skipstone.exporters.formats.gguf.parts import GgufModel, MetaValue, array, boolean, string, uint32

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class PreType:
    """One way of splitting text before byte-pair merges.

    Attributes:
        names: llama.cpp's names for it, the one to write first.
        split: regular expression of a Split step; None: the GPT-2 expression built into ByteLevel.
        digits: single digits are split off first.
    """

    names: tuple[str, ...]
    split: str | None = None
    digits: bool = False


PRE_TYPES = (
    PreType(("gpt-2", "default", "mpt", "olmo", "jais", "trillion")),
    PreType(("smollm", "codeshell", "exaone", "minerva-7b"), digits=True),
    PreType(("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx"), split=_LLAMA3_SPLIT),
    PreType(("qwen2", "deepseek-r1-qwen", "megrez"), split=_QWEN2_SPLIT),
)


def tokenizer_keys(checkpoint: Checkpoint, vocab_size: int) -> dict[str, MetaValue]:
    """The `tokenizer.ggml.*` keys of a checkpoint with a byte-level BPE tokenizer.

    Raises:
        CheckpointError: no tokenizer.json, not a byte-level BPE, or split in a way that llama.cpp has no name
            for.
    """
    file = checkpoint.path / "tokenizer.json"
    content = checkpoint.json("tokenizer.json")
    if not content:
        raise CheckpointError(f"{file}: not found", hint="save the tokenizer with save_pretrained(...)")
    pre_type = _pre_type_of(content, file)
    tokenizer = Tokenizer.from_file(str(file))
    tokens, types = _token_list(tokenizer, content, vocab_size)
    merges = [" ".join(m) if isinstance(m, list) else m for m in content["model"]["merges"]]
    keys = {
        "tokenizer.ggml.model": string("gpt2"),
        "tokenizer.ggml.pre": string(pre_type.names[0]),
        "tokenizer.ggml.tokens": array(tokens, gguf.GGUFValueType.STRING),
        "tokenizer.ggml.token_type": array(types, gguf.GGUFValueType.INT32),
        "tokenizer.ggml.merges": array(merges, gguf.GGUFValueType.STRING),
    }
    return keys | _special_keys(checkpoint, tokenizer)


def tokenizer_from_keys(model: GgufModel) -> Tokenizer:
    """Rebuild a tokenizer from a GGUF's keys.

    Raises:
        CheckpointError: not a byte-level BPE ("gpt2"), or of an unknown pre type.
    """
    kind, pre = model.get("tokenizer.ggml.model"), model.get("tokenizer.ggml.pre", "default")
    pre_type = next((entry for entry in PRE_TYPES if pre in entry.names), None)
    if kind != "gpt2" or pre_type is None:
        raise CheckpointError(
            f"{model.path}: tokenizer {kind!r} with pre type {pre!r} cannot be rebuilt, only 'gpt2' with "
            f"{', '.join(entry.names[0] for entry in PRE_TYPES)}",
            hint="export the Hugging Face checkpoint that the GGUF was made from",
        )
    tokens, types = list(model.get("tokenizer.ggml.tokens")), list(model.get("tokenizer.ggml.token_type"))
    merges = [tuple(merge.split(" ", 1)) for merge in model.get("tokenizer.ggml.merges")]
    specials = {
        token: AddedToken(token, special=kind == gguf.TokenType.CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)
    }
    vocabulary = {token: index for index, token in enumerate(tokens) if types[index] != gguf.TokenType.UNUSED}
    ignore_merges = pre_type.split == _LLAMA3_SPLIT
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(pre_type)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token in specials.values() if token.special])
    tokenizer.add_tokens([token for token in specials.values() if not token.special])
    bos = model.get("tokenizer.ggml.bos_token_id")
    if bos is not None and model.get("tokenizer.ggml.add_bos_token", pre_type.split == _LLAMA3_SPLIT):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", pair=f"{tokens[bos]} $A $B", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def _pre_tokenizer(pre_type: PreType) -> pre_tokenizers.PreTokenizer:
    if pre_type.split is not None:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pre_type.split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre_type.digits:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    return byte_level


def _pre_type_of(content: dict[str, Any], file: Path) -> PreType:
    model, given = content.get("model", {}), content.get("pre_tokenizer") or {}
    steps = given.get("pretokenizers", [given])
    kinds = [step.get("type") for step in steps]
    if model.get("type") != "BPE" or kinds[-1:] != ["ByteLevel"]:
        raise CheckpointError(
            f"{file}: a {model.get('type')} tokenizer with pre-tokenizer {' + '.join(map(str, kinds))}; "
            "a byte-level BPE was expected"
        )
    splits = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    digits = any(step.get("type") == "Digits" and step.get("individual_digits") for step in steps)
    built_in = bool(steps[-1].get("use_regex", True))
    known = len(steps) == 1 + len(splits) + digits and not steps[-1].get("add_prefix_space")
    for pre_type in PRE_TYPES:
        wanted = [] if pre_type.split is None else [pre_type.split]
        if known and splits == wanted and digits == pre_type.digits and built_in == (pre_type.split is None):
            return pre_type
    raise CheckpointError(
        f"{file}: pre-tokenizer {json.dumps(given, ensure_ascii=False)[:200]} matches none of "
        f"{', '.join(entry.names[0] for entry in PRE_TYPES)}",
        hint="llama.cpp needs a name for the way text is split",
    )


def _token_list(
    tokenizer: Tokenizer, content: dict[str, Any], vocab_size: int
) -> tuple[list[str], list[int]]:
    """Token texts and types, ids without a token filled as unused."""
    added = {entry["id"]: entry for entry in content.get("added_tokens", ())}
    by_id = {index: token for token, index in tokenizer.get_vocab(with_added_tokens=True).items()}
    tokens, types = [], []
    for index in range(vocab_size):
        token = by_id.get(index)
        if token is None:
            kind = gguf.TokenType.UNUSED
        elif index not in added:
            kind = gguf.TokenType.NORMAL
        elif added[index]["special"] or _looks_special(token):
            kind = gguf.TokenType.CONTROL
        else:
            kind = gguf.TokenType.USER_DEFINED
        tokens.append(f"[PAD{index}]" if token is None else token)
        types.append(int(kind))
    return tokens, types


def _looks_special(token: str) -> bool:
    return token in ("<pad>", "<mask>") or (token.startswith("<|") and token.endswith("|>"))


def _special_keys(checkpoint: Checkpoint, tokenizer: Tokenizer) -> dict[str, MetaValue]:
    settings, keys = checkpoint.json("tokenizer_config.json"), {}
    for kind, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        given = settings.get(f"{kind}_token")
        text = given.get("content") if isinstance(given, dict) else given
        index = (
            tokenizer.token_to_id(text)
            if isinstance(text, str)
            else getattr(checkpoint.config, f"{kind}_token_id", None)
        )
        if isinstance(index, int):
            keys[f"tokenizer.ggml.{key}_token_id"] = uint32(index)
    bos = keys.get("tokenizer.ggml.bos_token_id")
    keys["tokenizer.ggml.add_bos_token"] = boolean(adds_bos(tokenizer, None if bos is None else bos.value))
    template = chat_template_of(checkpoint)
    return keys if template is None else keys | {"tokenizer.chat_template": string(template)}
