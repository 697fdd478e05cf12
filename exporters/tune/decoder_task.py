"""Tuning a decoder on running text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerFast

from skipstone.errors import SkipstoneError
from skipstone.exporters.draft_table import write_draft_material
from skipstone.exporters.tune import attention, data
from skipstone.exporters.tune.card import Description
from skipstone.exporters.tune.evaluate import evaluate_exits
from skipstone.exporters.tune.models import decoder_layers
from skipstone.exporters.tune.objective import LayerSkipNet
from skipstone.exporters.tune.recipe import Recipe
from skipstone.exporters.tune.schedule import dropout_rates
from skipstone.exporters.tune.task import Evaluation, Ingredients
from skipstone.exporters.tune.trainer import Windows

if TYPE_CHECKING:
    from skipstone.exporters.tune.data import PackageShare

_DESCRIPTION = Description(
    pipeline="text-generation",
    what="A decoder of {} and {}",
    exiting="""It exits through the one final norm and LM head it has, so an early exit
can draft tokens that the whole model then verifies.""",
    sections=(),
    data="Python sources as running text.",
    limits="""Small and trained briefly: good for trying and measuring early exits and speculative decoding, not for
writing code that anyone relies on. It knows the style of its sources and little else, and may repeat passages
of them, to which their licences apply. The split is by exact content: a held-out file may have near relatives
in the training part. It was not aligned, filtered or tested for safety.""",
)


@dataclass(frozen=True)
class DecoderTask:
    """Next-token prediction on windows of a corpus; see `task.Task`."""

    recipe: Recipe
    net: LayerSkipNet
    tokenizer: PreTrainedTokenizerFast
    corpus: data.TokenisedCorpus
    batches: bool = False

    @property
    def train(self) -> Windows:
        """The training part in windows."""
        return Windows(self.corpus.train, self.recipe.training.sequence_length)

    @property
    def num_layers(self) -> int:
        """Layers of the decoder."""
        return decoder_layers(self.net.model)

    @property
    def tokens_per_step(self) -> float:
        """Tokens of a batch of windows."""
        return self.recipe.training.sequence_length * self.recipe.training.batch_size

    @property
    def corpus_tokens(self) -> int:
        """Tokens of the training part."""
        return len(self.corpus.train)

    @property
    def shares(self) -> tuple[PackageShare, ...]:
        """What each package contributes."""
        return self.corpus.shares

    def evaluate(self, trained: tuple[int, ...], size: int) -> Evaluation:
        """Loss and agreement of every exit on `size` windows of held-out text."""
        report = evaluate_exits(
            self.net,
            self.corpus.held_out,
            length=self.recipe.training.sequence_length,
            max_windows=size,
            trained=trained,
        )
        return Evaluation(report)

    def describe(self, evaluation: Evaluation) -> Description:
        """What a small decoder is and is not."""
        return _DESCRIPTION

    def write_beside(self, evaluation: Evaluation, folder: Path) -> None:
        """Token frequencies and a draft table."""
        config = self.net.model.config
        write_draft_material(self.corpus.train, config.vocab_size, config.eos_token_id, folder)


def prepare(ingredients: Ingredients) -> DecoderTask:
    """The task of a run; the corpus comes from its folder where it is there already."""
    model, recipe = ingredients.model, ingredients.recipe
    tokenizer, corpus = _corpus(ingredients)
    if ingredients.cpu:
        attention.use_for_training(model)
    rates = dropout_rates(recipe.layerskip.max_dropout, decoder_layers(model))
    net = LayerSkipNet(model, rates, compile_parts=ingredients.compile_parts)
    return DecoderTask(recipe, net, tokenizer, corpus)


def _corpus(ingredients: Ingredients) -> tuple[PreTrainedTokenizerFast, data.TokenisedCorpus]:
    folder, config = ingredients.folder, ingredients.model.config
    if (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder), data.load(folder)
    sources, tokenizer = ingredients.sources(), ingredients.tokenizer
    if tokenizer is None:
        texts = (source.text for source in sources if not source.held_out)
        tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=data.train_tokenizer(texts, config.vocab_size),
            bos_token=data.END_OF_TEXT,
            eos_token=data.END_OF_TEXT,
            pad_token=data.PAD,
            model_max_length=config.max_position_embeddings,
        )
    corpus = data.tokenise(sources, tokenizer.backend_tokenizer, _document_start(tokenizer))
    data.save(corpus, folder)
    tokenizer.save_pretrained(folder)
    return tokenizer, data.load(folder)


def _document_start(tokenizer: PreTrainedTokenizerFast) -> int:
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise SkipstoneError(
            "the tokenizer has neither a bos nor an eos token", hint="add one to its configuration"
        )
    return int(start)
