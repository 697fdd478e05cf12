"""The reference engine, against transformers run in one piece."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from skipstone.errors import CheckpointError, ContextFullError, EngineError, UsageError
from skipstone.runtimes.engines.eager import EagerEngine
from skipstone.runtimes.session import Session
from tests.exporters.tiny import CASES, VOCAB_SIZE, make_checkpoint

_NAMES = ("llama", "llama-3", "mistral", "qwen-2", "qwen-3", "smollm-3")
TOKENS = [int(token) for token in np.random.default_rng(8).integers(2, VOCAB_SIZE, 24)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("eager")
    return {name: make_checkpoint(folder / name, CASES[name]) for name in _NAMES}


@pytest.fixture
def engine(checkpoints: dict[str, Path]) -> EagerEngine:
    return EagerEngine.from_checkpoint(checkpoints["llama"], exits=(1, 3))


def whole(checkpoint: Path, tokens: Sequence[int]) -> np.ndarray:
    """Logits [n, vocab_size] of transformers' own forward pass."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor([list(tokens)])).logits[0].numpy()


@pytest.mark.parametrize("name", _NAMES)
def test_segments_together_give_the_logits_of_the_whole_model(
    name: str, checkpoints: dict[str, Path]
) -> None:
    engine = EagerEngine.from_checkpoint(checkpoints[name], exits=(1, 3))
    with Session(engine, 64) as session:
        rows = session.push(TOKENS)
        logits = np.stack(session.advance(rows, session.exits[-1]))
    np.testing.assert_allclose(logits, whole(checkpoints[name], TOKENS), atol=2e-5)


def test_an_exits_logits_are_those_of_a_model_of_that_many_layers(
    engine: EagerEngine, checkpoints: dict[str, Path]
) -> None:
    shallow = AutoModelForCausalLM.from_pretrained(
        checkpoints["llama"], dtype=torch.float32, num_hidden_layers=3
    )
    with torch.no_grad():
        expected = shallow(torch.tensor([TOKENS])).logits[0].numpy()
    with Session(engine, 64) as session:
        found = np.stack(session.advance(session.push(TOKENS), 3))
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_the_draft_vocabulary_selects_the_same_logits(
    checkpoints: dict[str, Path], engine: EagerEngine
) -> None:
    few = np.array([3, 77, 300], np.int32)
    trimmed = EagerEngine.from_checkpoint(checkpoints["llama"], exits=(1, 3), draft_vocabulary=few)
    with Session(engine, 64) as full, Session(trimmed, 64) as part:
        expected = np.stack(full.advance(full.push(TOKENS), 1))[:, few]
        np.testing.assert_array_equal(np.stack(part.advance(part.push(TOKENS), 1)), expected)


def test_rows_drafted_to_an_exit_and_then_verified_are_as_rows_run_at_once(
    engine: EagerEngine, checkpoints: dict[str, Path]
) -> None:
    with Session(engine, 64) as session:
        session.prefill(TOKENS[:8])
        rows = session.push(TOKENS[8:])
        for row in rows:
            session.advance([row], 1)
        session.advance(rows[:5], 3)
        logits = np.stack(session.advance(rows, 4))
    np.testing.assert_allclose(logits, whole(checkpoints["llama"], TOKENS)[8:], atol=2e-5)


def test_every_path_of_a_tree_gives_the_logits_of_its_own_text(
    engine: EagerEngine, checkpoints: dict[str, Path]
) -> None:
    with Session(engine, 64) as session:
        session.prefill(TOKENS[:6])
        rows = session.push([10, 11, 12, 13, 14, 15], [-1, -1, 0, 0, 1, 2])
        logits = session.advance(rows, 4)
        paths = [[10], [11], [10, 12], [10, 13], [11, 14], [10, 12, 15]]
        for path, found in zip(paths, logits, strict=True):
            expected = whole(checkpoints["llama"], TOKENS[:6] + path)[-1]
            np.testing.assert_allclose(found, expected, atol=2e-5, err_msg=str(path))


def test_after_committing_a_branch_its_text_is_the_context(
    engine: EagerEngine, checkpoints: dict[str, Path]
) -> None:
    with Session(engine, 64) as session:
        session.prefill(TOKENS[:6])
        rows = session.push([10, 11, 12, 13, 14], [-1, -1, 1, 0, 2])  # 11 → 12 → 14 wins
        session.advance(rows, 4)
        session.commit(rows[4])
        assert list(session.tokens) == [*TOKENS[:6], 11, 12, 14]
        (found,) = session.advance(session.push([20]), 4)
    expected = whole(checkpoints["llama"], [*TOKENS[:6], 11, 12, 14, 20])[-1]
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_rows_committed_at_an_early_exit_are_caught_up_later(
    engine: EagerEngine, checkpoints: dict[str, Path]
) -> None:
    with Session(engine, 64) as session:
        session.prefill(TOKENS[:6])
        for token in TOKENS[6:10]:
            (row,) = session.push([token])
            session.advance([row], 1)
            session.commit(row)
        (found,) = session.advance(session.push([TOKENS[10]]), 4)
    np.testing.assert_allclose(found, whole(checkpoints["llama"], TOKENS[:11])[-1], atol=2e-5)


def test_after_a_rewind_other_text_follows_as_if_the_first_had_never_been(
    engine: EagerEngine, checkpoints: dict[str, Path]
) -> None:
    with Session(engine, 64) as session:
        session.prefill(TOKENS)
        session.rewind(9)
        logits = session.prefill([30, 31, 32])
    expected = whole(checkpoints["llama"], [*TOKENS[:9], 30, 31, 32])[-1]
    np.testing.assert_allclose(logits, expected, atol=2e-5)


def test_a_full_context_is_refused_and_the_session_goes_on(engine: EagerEngine) -> None:
    with Session(engine, 8) as session:
        session.prefill(TOKENS[:6])
        with pytest.raises(ContextFullError):
            session.advance(session.push([1, 2, 3]), 4)
        session.discard()
        assert session.advance(session.push([1, 2]), 4)[1].shape == (VOCAB_SIZE,)


@pytest.mark.parametrize("exits", [(4,), (0,), (3, 1), (2, 2)])
def test_exits_that_cannot_be_are_refused(exits: tuple[int, ...], checkpoints: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="exits"):
        EagerEngine.from_checkpoint(checkpoints["llama"], exits=exits)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        EagerEngine.from_checkpoint(tmp_path)


def test_a_model_that_is_no_plain_decoder_is_refused() -> None:
    with pytest.raises(EngineError, match="Linear is not built as a plain decoder"):
        EagerEngine(torch.nn.Linear(2, 2))
