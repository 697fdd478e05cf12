"""Recipes: the same steps whichever way they are written, and nothing unknown taken."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipstone.errors import UsageError
from skipstone.exporters.compress.depth import DropLayers
from skipstone.exporters.compress.recipe import load_recipe, parse_steps, recipe_text
from skipstone.exporters.compress.sparsify.step import Sparsify
from skipstone.exporters.compress.steps import Step
from skipstone.exporters.compress.width import PruneHeads, PruneWidth

_STACKS = st.sampled_from(["decoder", "encoder"])
_DROPS = st.one_of(
    st.builds(
        DropLayers,
        count=st.integers(1, 40),
        by=st.sampled_from(["top", "bottom", "alternate", "symmetric", "cosine", "contribution"]),
        stack=_STACKS,
        iterative=st.booleans(),
    ),
    st.builds(
        DropLayers, layers=st.lists(st.integers(0, 40), min_size=1, unique=True).map(tuple), stack=_STACKS
    ),
)
_HEADS = st.builds(PruneHeads, count=st.integers(1, 8), refit=st.booleans())
_WIDTHS = st.builds(PruneWidth, share=st.floats(0.01, 0.99))
_ZEROS = st.builds(
    Sparsify,
    sparsity=st.floats(0.01, 0.99),
    layers=st.dictionaries(st.sampled_from(["0-2", "3", "encoder.1"]), st.sampled_from(["0.25", "2:4"])),
)
_RECIPES = st.lists(st.one_of(_DROPS, _HEADS, _WIDTHS, _ZEROS), min_size=1, max_size=4)


@given(steps=_RECIPES)
def test_a_recipe_reads_back_as_the_steps_it_was_written_from(
    steps: list[Step], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    file.write_text(recipe_text(steps), encoding="utf-8")
    assert load_recipe(file) == tuple(steps)


def test_flags_and_a_file_say_the_same(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(
        '[[step]]\nkind = "drop_layers"\nlayers = [3, 5]\n\n'
        '[[step]]\nkind = "sparsify"\nsparsity = 0.5\nlayers = {"0-1" = "0.3", "2" = "2:4"}\n',
        encoding="utf-8",
    )
    flags = ["drop_layers:layers=3+5", "sparsify:sparsity=0.5,layers=0-1:0.3+2:2:4"]
    assert load_recipe(file) == parse_steps(flags)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no [[step]] found"),
        ("step = 3", "no [[step]] found"),
        ('name = "x"\n[[step]]\nkind = "drop_layers"', "name: unknown key"),
        ("[[step]]\ncount = 3", "step 1: no kind found"),
        ('[[step]]\nkind = "melt"', "step 1: step 'melt' is not known"),
        ('[[step]]\nkind = "drop_layers"\ncount = 3\ncuont = 3', "step 1: drop_layers.cuont"),
        ('[[step]]\nkind = "drop_layers"\ncount = "many"', "step 1: drop_layers.count"),
        ("[[step]", "not valid TOML"),
    ],
)
def test_a_recipe_that_says_something_else_is_refused_by_key(
    content: str, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load_recipe(file)
    assert str(file) in caught.value.message
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("melt", "step 'melt' is not known"),
        ("drop_layers:3", "'3': key=value was expected"),
        ("drop_layers:count=3,count=4", "every key once"),
        ("drop_layers:count=3,cuont=4", "drop_layers.cuont"),
        ("drop_layers:layers=1+x", "drop_layers.layers.1"),
    ],
)
def test_a_flag_that_says_something_else_is_refused_by_key(flag: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_steps([flag])
    assert f"--compress {flag}" in caught.value.message
    assert words in caught.value.message
