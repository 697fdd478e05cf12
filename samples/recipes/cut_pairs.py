"""Cut sentences to correct from the held-out files of a recipe's corpus.

    python samples/recipes/cut_pairs.py samples/recipes/speller.toml samples/prompts/speller_held_out.jsonl

Lines of source, the sentence with errors, and target, the clean one: spread evenly over the held-out files, with the
errors that `skipstone tune` makes in them for its own evaluation. No target occurs in a training file.
"""

from __future__ import annotations

import json
from pathlib import Path

import typer

from skipstone.exporters.tune.data import collect
from skipstone.exporters.tune.evaluate_seq2seq import held_out_pairs
from skipstone.exporters.tune.pairs import sentence_corpus
from skipstone.exporters.tune.recipe import load_recipe


def main(recipe: str, output: Path, count: int = 256) -> None:
    """Cut COUNT pairs."""
    chosen = load_recipe(recipe)
    corpus = sentence_corpus(collect(chosen.corpus))
    pairs = held_out_pairs(corpus, chosen.noise, seed=chosen.training.seed, size=count)
    lines = [
        json.dumps({"source": source, "target": target}, ensure_ascii=False) + "\n"
        for source, target in zip(pairs.sources, pairs.targets, strict=True)
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
