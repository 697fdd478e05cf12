from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from skipstone.errors import SkipstoneError
from skipstone.exporters.tune import data
from skipstone.exporters.tune.recipe import Corpus

PACKAGES = ("rich", "click", "packaging")


@pytest.fixture(scope="module")
def sources() -> list[data.Source]:
    return data.collect(Corpus(packages=PACKAGES, held_out_modulus=5, max_share=1.0))


def test_no_held_out_text_is_in_the_training_part(sources: list[data.Source]) -> None:
    held_out = {source.text for source in sources if source.held_out}
    training = {source.text for source in sources if not source.held_out}
    assert held_out
    assert not held_out & training


def test_about_one_file_in_the_modulus_is_held_out(sources: list[data.Source]) -> None:
    count, share = len(sources), 1 / 5
    held_out = sum(source.held_out for source in sources)
    assert abs(held_out - share * count) < 4 * math.sqrt(count * share * (1 - share))


def test_a_file_is_held_out_by_its_content_alone(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.py").write_text(f"text {number}\n")
    before = {source.text: source.held_out for source in data.read_texts([tmp_path], 3)}
    (tmp_path / "0.py").rename(tmp_path / "renamed.py")
    after = {source.text: source.held_out for source in data.read_texts([tmp_path], 3)}
    assert before == after
    assert set(before.values()) == {True, False}


def test_tests_vendored_copies_and_duplicates_are_left_out(sources: list[data.Source]) -> None:
    assert len({source.digest for source in sources}) == len(sources)
    assert {source.package for source in sources} == set(PACKAGES)
    parts = {part for source in sources for part in Path(source.path).parts}
    assert not parts & {"tests", "test", "_vendor", "__pycache__"}


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("pkg/core.py", True),
        ("pkg/latest/contest.py", True),
        ("pkg/tests/core.py", False),
        ("pkg/_vendor/core.py", False),
        ("pkg/test_core.py", False),
        ("pkg/conftest.py", False),
        ("pkg/core.pyi", False),
    ],
)
def test_the_path_tells_whether_a_file_belongs_in_the_corpus(path: str, wanted: bool) -> None:
    assert data._wanted(Path(path)) is wanted


def test_tables_are_told_from_code() -> None:
    assert data._is_table("VALUES = [\n" + "    0x1234, 0x5678,\n" * 50 + "]\n")
    assert data._is_table('BLOB = "' + "ab" * 2000 + '"\n')
    assert not data._is_table(Path(data.__file__).read_text())


def test_no_package_exceeds_its_share_when_there_are_enough_packages() -> None:
    names = ("rich", "click", "packaging", "typer", "jinja2", "pyparsing", "networkx")
    capped = data.package_shares(data.collect(Corpus(packages=names, max_share=0.25)))
    total = sum(share.bytes for share in capped)
    assert max(share.bytes for share in capped) <= 0.26 * total
    assert {share.package for share in capped} == set(names)


def test_shares_state_the_packages_version_and_licence(sources: list[data.Source]) -> None:
    from importlib import metadata

    for share in data.package_shares(sources):
        assert share.version == metadata.version(share.package)
        assert share.licence
        assert share.files == sum(source.package == share.package for source in sources)


def test_the_tokenizer_is_lossless_and_has_its_special_tokens_first() -> None:
    text = "def naïve(x):\n\treturn  'ß' * 12345  # 東京 🪨\r\n"
    tokenizer = data.train_tokenizer([text * 3, "class A:\n    pass\n" * 9], 320)
    assert tokenizer.get_vocab_size() <= 320
    assert [tokenizer.id_to_token(i) for i in (0, 1)] == [data.END_OF_TEXT, data.PAD]
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(tokenizer.get_vocab())


def test_every_document_begins_with_the_start_token_and_keeps_its_text(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"document {number} " * 5)
    sources = data.read_texts([tmp_path], 4)
    tokenizer = data.train_tokenizer((source.text for source in sources), 300)
    corpus = data.tokenise(sources, tokenizer, 0)
    for tokens, held_out in ((corpus.train, False), (corpus.held_out, True)):
        pieces = np.split(tokens, np.flatnonzero(tokens == 0))[1:]
        texts = {tokenizer.decode(piece[1:].tolist()) for piece in pieces}
        assert texts == {source.text for source in sources if source.held_out is held_out}


def test_a_saved_corpus_loads_the_same(tmp_path: Path, sources: list[data.Source]) -> None:
    tokenizer = data.train_tokenizer((source.text for source in sources[:5]), 300)
    corpus = data.tokenise(sources[:40], tokenizer, 0)
    data.save(corpus, tmp_path)
    loaded = data.load(tmp_path)
    assert np.array_equal(loaded.train, corpus.train)
    assert np.array_equal(loaded.held_out, corpus.held_out)
    assert loaded.shares == corpus.shares


def test_jsonl_lines_are_texts_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"line {i}"}) for i in range(3)))
    assert [source.text for source in data.read_texts([path], 2)] == ["line 0", "line 1", "line 2"]


def test_data_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SkipstoneError, match="nowhere"):
        data.read_texts([tmp_path / "nowhere"], 2)
    with pytest.raises(SkipstoneError, match="no text"):
        data.read_texts([tmp_path], 2)
    (tmp_path / "bad.jsonl").write_text('{"txt": 1}\n')
    with pytest.raises(SkipstoneError, match=r"bad\.jsonl"):
        data.read_texts([tmp_path], 2)


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(SkipstoneError, match="no-such-package"):
        data.collect(Corpus(packages=("no-such-package",)))


def test_a_recipe_without_a_corpus_asks_for_one() -> None:
    with pytest.raises(SkipstoneError, match="empty") as caught:
        data.collect(Corpus())
    assert "--data" in caught.value.hint
