from __future__ import annotations

from pathlib import Path

import pytest

from skipstone.errors import SkipstoneError
from skipstone.exporters.tune.card import to_toml
from skipstone.exporters.tune.recipe import (
    LayerSkip,
    Recipe,
    exits_of,
    load_recipe,
    parse_recipe,
    rotation_for,
)

CODER = Path(__file__).parents[3] / "samples" / "recipes" / "coder.toml"


def test_the_built_in_recipe_needs_no_file() -> None:
    assert load_recipe("layerskip") == Recipe()


def test_the_recipe_of_an_encoder_decoder_is_written_back_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(CODER.with_name("speller.toml"))
    assert recipe.task == "seq2seq"
    assert exits_of(recipe.layerskip.rotation) == (1, 2, 3)
    copy = tmp_path / "copy.toml"
    copy.write_text(to_toml(recipe))
    assert load_recipe(copy) == recipe


def test_a_decoders_recipe_says_nothing_of_the_other_task() -> None:
    text = to_toml(load_recipe(CODER))
    assert "noise" not in text
    assert "seq2seq" not in text


def test_the_shipped_recipe_reads_and_is_written_back_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(CODER)
    assert exits_of(recipe.layerskip.rotation) == (2, 3, 4, 6, 8)
    copy = tmp_path / "copy.toml"
    copy.write_text(to_toml(recipe))
    assert load_recipe(copy) == recipe


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("[layerskip]\nmax_droput = 0.1", "layerskip.max_droput"),
        ("[layerskip]\nmax_dropout = 1.5", "layerskip.max_dropout"),
        ("[training]\nbatch_size = 0", "training.batch_size"),
        ('[corpus]\npackages = "torch"', "corpus.packages"),
        ("[trainning]\nseed = 1", "trainning"),
        ('task = "seq2sec"', "task"),
        ("[noise]\nrate = 0.0", "noise.rate"),
        ("[noise]\nswap = -1", "noise.swap"),
        ("[seq2seq]\nencoder_exits = [0]", "seq2seq.encoder_exits"),
        ("[training\n", "not valid TOML"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_file_and_the_key(
    tmp_path: Path, content: str, named: str
) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(content)
    with pytest.raises(SkipstoneError, match=r"wrong\.toml") as caught:
        load_recipe(path)
    assert named in caught.value.message
    assert caught.value.hint


def test_a_missing_recipe_is_refused_with_the_name_of_the_built_in_one() -> None:
    with pytest.raises(SkipstoneError, match=r"nothing\.toml") as caught:
        load_recipe("nothing.toml")
    assert "layerskip" in caught.value.hint


@pytest.mark.parametrize("layers", [2, 3, 4, 12, 16, 28, 80])
def test_the_default_rotation_has_rising_exits_below_the_last_layer(layers: int) -> None:
    for group in rotation_for(LayerSkip(), layers):
        assert list(group) == sorted(set(group))
        assert group[0] >= 1
        assert group[-1] < layers


def test_the_default_rotation_of_twelve_layers_trains_the_early_exits_most() -> None:
    assert rotation_for(LayerSkip(), 12) == ((2, 4), (3, 6), (2, 4), (3, 8))


def test_an_exit_at_or_past_the_last_layer_is_refused() -> None:
    layerskip = parse_recipe({"layerskip": {"rotation": [[2], [12]]}}, name="test").layerskip
    with pytest.raises(SkipstoneError, match="exit 12"):
        rotation_for(layerskip, 12)
    assert rotation_for(layerskip, 13) == ((2,), (12,))


def test_a_model_of_one_layer_has_no_exit_to_train() -> None:
    with pytest.raises(SkipstoneError, match="no early exit"):
        rotation_for(LayerSkip(), 1)
