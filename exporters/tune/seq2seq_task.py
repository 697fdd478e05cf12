"""Tuning an encoder-decoder to correct prose."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerFast

from skipstone.exporters.draft_table import write_draft_material
from skipstone.exporters.lexicon import LEXICON_FILE, count_words
from skipstone.exporters.tune import pairs
from skipstone.exporters.tune.card import Description, table
from skipstone.exporters.tune.dictionary import dictionary_corrector
from skipstone.exporters.tune.evaluate_seq2seq import (
    CorrectionReport,
    Pairs,
    corrections,
    evaluate_correction,
    evaluate_pairs,
    held_out_pairs,
)
from skipstone.exporters.tune.models import decoder_layers
from skipstone.exporters.tune.pairs import PairBatches, SentenceCorpus, token_stream
from skipstone.exporters.tune.recipe import Recipe
from skipstone.exporters.tune.schedule import dropout_rates
from skipstone.exporters.tune.seq2seq import Seq2SeqNet
from skipstone.exporters.tune.task import Evaluation, Ingredients

if TYPE_CHECKING:
    from skipstone.exporters.tune.data import PackageShare


@dataclass(frozen=True)
class Seq2SeqTask:
    """Clean sentences from noisy ones; see `task.Task`."""

    recipe: Recipe
    net: Seq2SeqNet
    tokenizer: PreTrainedTokenizerFast
    corpus: SentenceCorpus
    train: PairBatches
    batches: bool = True

    @property
    def num_layers(self) -> int:
        """Layers of the decoder."""
        return decoder_layers(self.net.model)

    @property
    def tokens_per_step(self) -> float:
        """Target tokens of an epoch over its batches."""
        return self.train.tokens / len(self.train)

    @property
    def corpus_tokens(self) -> int:
        """Target tokens of an epoch."""
        return self.train.tokens

    @property
    def shares(self) -> tuple[PackageShare, ...]:
        """What each package contributes."""
        return self.corpus.shares

    def held_out(self, size: int) -> Pairs:
        """Held-out sentences with errors, the same for every run of the recipe."""
        return held_out_pairs(self.corpus, self.recipe.noise, seed=self.recipe.training.seed, size=size)

    def evaluate(self, trained: tuple[int, ...], size: int) -> Evaluation:
        """Exits of both stacks, and corrections beside a dictionary's, on `size` held-out sentences."""
        held_out = self.held_out(size)
        correctors = {
            "dictionary": dictionary_corrector(self.corpus.train),
            "model": lambda sources: corrections(self.net.model, self.tokenizer, sources),
        }
        return Evaluation(
            evaluate_pairs(self.net, self.tokenizer, held_out, trained=trained),
            evaluate_correction(held_out, correctors),
        )

    def write_beside(self, evaluation: Evaluation, folder: Path) -> None:
        """The exits that were trained, the figures of correction, token frequencies, a draft table and a lexicon."""
        trained = {
            name: [figures.exit for figures in exits if figures.trained]
            for name, exits in (
                ("exits", evaluation.exits.exits),
                ("encoder_exits", evaluation.exits.encoder_exits),
            )
        }
        (folder / "exits.json").write_text(json.dumps(trained) + "\n", encoding="utf-8")
        if evaluation.correction is not None:
            evaluation.correction.save(folder / "correction_report.json")
        tokens = token_stream(self.tokenizer.backend_tokenizer, self.corpus.train)
        write_draft_material(tokens, len(self.tokenizer), pairs.END_ID, folder)
        count_words(self.corpus.train).save(folder / LEXICON_FILE)

    def describe(self, evaluation: Evaluation) -> Description:
        """What a small corrector does, how well, and what it is not."""
        config = self.net.model.config
        sections = () if evaluation.correction is None else (_correction(evaluation.correction),)
        return Description(
            pipeline="text2text-generation",
            what=f"An encoder-decoder (T5) of {{}}, {config.num_layers} layers of encoder and {{}} of decoder,\n"
            "that corrects typing errors and simple grammar slips in English prose",
            exiting="""Decoder exits go through the one final norm and LM head
it has, encoder exits through the encoder's final norm.""",
            sections=sections,
            data="Sentences of the docstrings and comments of Python sources, clean as targets; as sources, the same\n"
            "with errors of the recipe's `[noise]`, other ones every epoch.",
            limits=_LIMITS,
        )


_LIMITS = """Small and trained briefly: good for trying and measuring speculative decoding and early exits of
encoder-decoders, not for correcting text that matters. It knows single sentences of technical English, with errors
of the kinds that the recipe lists; what it makes of other text was not measured. Errors that people make differ from
random ones, so figures on these are too good. It may change what was right. The split is by exact content of files
and no sentence is in both parts, but sentences like a held-out one may have been trained on."""


def _correction(report: CorrectionReport) -> str:
    rows = [
        (
            name,
            f"{figures.accuracy:.3f}",
            f"{figures.precision:.3f}",
            f"{figures.recall:.3f}",
            f"{figures.f05:.3f}",
            f"{figures.character_error_rate:.2%}",
        )
        for name, figures in report.correctors.items()
    ]
    count = next(iter(report.correctors.values())).sentences
    header = ("text", "sentence accuracy", "precision", "recall", "F0.5", "character error rate")
    return f"""## Correction of held-out sentences

{count:,} sentences of files that were not trained on, with errors as the recipe makes them. Sentence accuracy: the
sentence is the clean one, character by character. Precision, recall and F0.5 are of edits of words, aligned
as docs/tune.md says. `dictionary` is pyspellchecker, given the words of the training sentences. The same figures are
in `correction_report.json`.

{table(header, rows)}"""


def prepare(ingredients: Ingredients) -> Seq2SeqTask:
    """The task of a run; the corpus comes from its folder where it is there already."""
    model, recipe = ingredients.model, ingredients.recipe
    net = Seq2SeqNet(
        model,
        dropout_rates(recipe.layerskip.max_dropout, decoder_layers(model)),
        encoder_exits=recipe.seq2seq.encoder_exits,
        encoder_share=recipe.seq2seq.encoder_share,
        alignment_weight=recipe.seq2seq.alignment_weight,
        compile_parts=ingredients.compile_parts,
    )
    tokenizer, corpus = _corpus(ingredients)
    training = recipe.training
    train = PairBatches(
        corpus.train,
        tokenizer,
        recipe.noise,
        longest=training.sequence_length,
        tokens_per_batch=training.sequence_length * training.batch_size,
        seed=training.seed,
        aligned=recipe.seq2seq.alignment_weight > 0,
    )
    return Seq2SeqTask(recipe, net, tokenizer, corpus, train)


def _corpus(ingredients: Ingredients) -> tuple[PreTrainedTokenizerFast, pairs.SentenceCorpus]:
    folder, config = ingredients.folder, ingredients.model.config
    if (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder), pairs.load(folder)
    corpus = pairs.sentence_corpus(ingredients.sources())
    tokenizer = ingredients.tokenizer
    if tokenizer is None:
        tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=pairs.train_tokenizer(corpus.train, config.vocab_size),
            eos_token=pairs.END,
            pad_token=pairs.PAD,
            model_max_length=getattr(config, "n_positions", 512),
        )
    pairs.save(corpus, folder)
    tokenizer.save_pretrained(folder)
    return tokenizer, corpus
