r"""Cut sentences to correct from the held-out files of a recipe's corpus, or from the others.

    python samples/recipes/cut_pairs.py samples/recipes/speller.toml samples/prompts/speller_held_out.jsonl \
        --calibration samples/prompts/speller_calibration.jsonl
    python samples/recipes/cut_pairs.py samples/recipes/speller.toml samples/prompts/speller_sparse.jsonl \
        --count 128 --clean 0.5 --rate 0.03

The second has one wrong word in twenty, as text typed with some care has; the first has the recipe's, one in six.

Lines of source, the sentence with errors, and target, the clean one: spread evenly over the held-out files. No target
occurs in a training file. Of every three sentences one goes to the first file, to measure with; the others to the
second, for `skipstone calibrate`, so that nothing is chosen by the sentences that figures are given for.

With `--training` the pairs come from the training files instead, for `skipstone compress` to learn from:

    python samples/recipes/cut_pairs.py samples/recipes/speller.toml samples/calibration/prose.jsonl \
        --training --count 480
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from skipstone.exporters.tune.data import collect
from skipstone.exporters.tune.evaluate_seq2seq import held_out_pairs
from skipstone.exporters.tune.pairs import SentenceCorpus, noisy, sentence_corpus
from skipstone.exporters.tune.recipe import Noise, load_recipe


def main(
    recipe: str,
    output: Path,
    count: int = 256,
    calibration: Annotated[Path | None, typer.Option()] = None,
    clean: Annotated[float | None, typer.Option(help="Share of sentences without an error.")] = None,
    rate: Annotated[float | None, typer.Option(help="Mean share of wrong words in the others.")] = None,
    training: Annotated[
        bool, typer.Option("--training", help="From training files, not held-out ones.")
    ] = False,
) -> None:
    """Cut COUNT pairs to OUTPUT, and twice as many others to CALIBRATION; errors as the recipe's [noise] says."""
    chosen = load_recipe(recipe)
    given = {name: value for name, value in (("clean", clean), ("rate", rate)) if value is not None}
    noise = replace(chosen.noise, **given)
    corpus = sentence_corpus(collect(chosen.corpus))
    if training:
        write(output, training_pairs(corpus, noise, seed=chosen.training.seed, size=count))
        return
    pairs = held_out_pairs(corpus, noise, seed=chosen.training.seed, size=3 * count)
    both = list(zip(pairs.sources, pairs.targets, strict=True))
    write(output, both[::3])
    if calibration is not None:
        write(calibration, [pair for at, pair in enumerate(both) if at % 3])


def training_pairs(corpus: SentenceCorpus, noise: Noise, *, seed: int, size: int) -> list[tuple[str, str]]:
    """`size` training sentences, spread evenly over their files, with the errors of the first epoch."""
    count = len(corpus.train)
    chosen = (index * count // size for index in range(size))
    return [
        (noisy(corpus.train[index], noise, seed=seed, epoch=0, index=index), corpus.train[index])
        for index in chosen
    ]


def write(path: Path, pairs: Sequence[tuple[str, str]]) -> None:
    """One object a line."""
    lines = [json.dumps({"source": source, "target": target}, ensure_ascii=False) for source, target in pairs]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
