"""Prompt files."""

import json
from pathlib import Path

import pytest

from skipstone.benchmark.prompts import Texts, read_prompts
from skipstone.builtin_texts import PROMPTS, SOURCES
from skipstone.errors import UsageError


def test_prompts_come_in_order_and_other_keys_are_ignored(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "é\\n", "source": "x", "target": "y"}\n\n{"prompt": "b"}\n', encoding="utf-8")
    assert read_prompts(file) == Texts(("é\n", "b"), ("x",))


def test_a_line_holds_a_prompt_or_a_source_or_both(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(
        '{"source": "a", "target": "b"}\n{"prompt": "c", "source": "d"}\n{"prompt": "e", "source": 3}\n'
    )
    assert read_prompts(file) == Texts(("c", "e"), ("a", "d"))


def test_line_separators_inside_a_prompt_do_not_split_it(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    text = "a\u2028b\x85c\x0bd"
    file.write_text(json.dumps({"prompt": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_prompts(file).prompts == (text,)


def test_a_line_that_does_not_fit_is_named_by_its_number(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    with pytest.raises(UsageError, match=r"p\.jsonl, line 2"):
        read_prompts(file)


def test_the_built_in_prompts_differ() -> None:
    for texts in (PROMPTS, SOURCES):
        assert len(set(texts)) == len(texts) >= 4
