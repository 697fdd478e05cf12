"""Strategies by name: how a user's choice becomes a policy. A new one is one function and one line in STRATEGIES."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace

from skipstone.errors import UsageError
from skipstone.runtimes.costs import CostModel
from skipstone.runtimes.drafters import text_drafter
from skipstone.runtimes.drafters.aggressive import AggressiveDrafter, Guide
from skipstone.runtimes.drafters.base import Drafter
from skipstone.runtimes.drafters.draft_model import DraftModelMaker
from skipstone.runtimes.drafters.early_exit import EarlyExitDrafter
from skipstone.runtimes.drafters.gated import GatedDrafter
from skipstone.runtimes.drafters.growth import GrowthOptions
from skipstone.runtimes.drafters.lexicon import Amendments, Followed
from skipstone.runtimes.drafters.mixed import MixedDrafter
from skipstone.runtimes.drafters.ngram import NGramDrafter
from skipstone.runtimes.drafters.pooled import PooledDrafter
from skipstone.runtimes.drafters.table import NGramTable, TableDrafter
from skipstone.runtimes.engines.base import Engine
from skipstone.runtimes.generate import FixedPolicy, Policy
from skipstone.runtimes.policies.arms import Record
from skipstone.runtimes.policies.auto import AutoPolicy
from skipstone.runtimes.shapes import TreeShape

# Where a lexicon knows better: that the source is right, that the lexicon is.
_AS_IT_IS, _AMENDED = 0.25, 0.6


@dataclass(frozen=True)
class StrategyOptions:
    """What a user may fix; None leaves it to the strategy.

    Attributes:
        assistant_early_exit: exit to draft with.
        num_assistant_tokens: longest draft.
        assistant_confidence_threshold: stop a draft when the drafting model's probability falls under it.
        prompt_lookup_num_tokens: longest copied draft.
        guide: a text that the output may resemble: a template, a passage that was retrieved. Aggressive drafts are
            copied from it, and from an encoder-decoder's source in any case.
        assistant_later_exit: exit that judges what the first one drafts, and drafts further.
        draft_tree: the tree that an exit drafts round after round, for layerskip.
    """

    assistant_early_exit: int | None = None
    num_assistant_tokens: int | None = None
    assistant_confidence_threshold: float | None = None
    prompt_lookup_num_tokens: int | None = None
    guide: str | None = None
    assistant_later_exit: int | None = None
    draft_tree: TreeShape | None = None

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        for flag in ("num_assistant_tokens", "prompt_lookup_num_tokens"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                raise UsageError(f"--{flag.replace('_', '-')} {value}: expected at least 1")
        threshold = self.assistant_confidence_threshold
        if threshold is not None and not 0 <= threshold < 1:
            raise UsageError(f"--assistant-confidence-threshold {threshold}: expected a value in [0, 1)")
        if self.guide == "":
            raise UsageError("--guide: the text is empty", hint="leave --guide out, or pass some text")
        if self.draft_tree is not None and self.num_assistant_tokens is not None:
            raise UsageError(
                "--draft-tree, --num-assistant-tokens: a tree has its length", hint="pass one of them"
            )


@dataclass(frozen=True)
class Materials:
    """What strategies are made of.

    Attributes:
        engine: the target.
        costs: its cost model.
        options: the user's.
        table: the bundle's n-gram table, or None.
        draft_model: makes the draft model's drafter with a given source and shape, or None without a draft model.
        guide: gives the tokens of the user's guide, or None without one.
        begins: gives the tokens that begin a word, or None where nothing is known of the vocabulary.
        amendments: how a lexicon reads sources, or None without one.
        record: what ways to draft have brought before, by their drafters' names, for `auto`.
    """

    engine: Engine
    costs: CostModel
    options: StrategyOptions
    table: NGramTable | None = None
    draft_model: DraftModelMaker | None = None
    guide: Guide | None = None
    begins: Callable[[], Container[int]] | None = None
    amendments: Amendments | None = None
    record: Mapping[str, Record] | None = None

    def guided(self) -> list[Drafter]:
        """What copies from a text that the output may resemble: an encoder-decoder's source, the user's guide."""
        begins = self.begins() if self.begins and (self.guide or self.engine.encoder) else None
        parts: list[Drafter] = []
        if self.engine.encoder is not None and self.amendments is None:
            parts.append(AggressiveDrafter(begins=begins))
        elif self.engine.encoder is not None and self.amendments is not None:
            parts.append(AggressiveDrafter(self.amendments.source, begins=begins, doubt=_AS_IT_IS))
            parts.append(AggressiveDrafter(self.amendments.amended, "lexicon", begins, _AMENDED))
        if (guide := self.guide) is not None:
            parts.append(AggressiveDrafter(lambda _source: Followed(tuple(guide())), "guide", begins))
        return parts

    def guide_drafter(self) -> Drafter | None:
        """What `guided` holds as one drafter; None where there is nothing."""
        parts = self.guided()
        if len(parts) < 2:
            return parts[0] if parts else None
        return MixedDrafter(parts)

    def text_source(self) -> Drafter:
        """The cheapest stage, which drafts from text alone: its parts' trees merged.

        Token recycling is none of them: beside the others its drafts cost more than they bring.
        """
        parts = [text_drafter(name, self.engine.vocab_size) for name in ("prompt-lookup", "katz")]
        if self.table is not None:
            parts.append(TableDrafter(self.table))
        pooled, guided = PooledDrafter(parts), self.guided()
        return MixedDrafter([*guided, pooled]) if guided else pooled


def make_policy(name: str, materials: Materials) -> Policy:
    """The policy of a strategy.

    Raises:
        UsageError: an unknown strategy, or one this bundle cannot run.
    """
    make = STRATEGIES.get(name)
    if make is None:
        raise UsageError(f"--strategy {name}: not known", hint=f"one of {', '.join(STRATEGIES)}")
    if materials.options.draft_tree is not None and name not in ("layerskip", "plain"):
        raise UsageError(f"--draft-tree: does not go with strategy {name}", hint="choose layerskip alone")
    return make(materials)


def _plain(_materials: Materials) -> Policy:
    return FixedPolicy(None)


def _prompt_lookup(materials: Materials) -> Policy:
    return FixedPolicy(NGramDrafter(length=materials.options.prompt_lookup_num_tokens or 10))


def _aggressive(materials: Materials) -> Policy:
    """Copies of the guides, cut to the length that pays."""
    guided = materials.guide_drafter()
    if guided is None:
        raise UsageError(
            "--strategy aggressive: a decoder alone has no source to copy from",
            hint="pass a text with --guide",
        )
    return FixedPolicy(GatedDrafter(guided))


def _text(names: str) -> Callable[[Materials], Policy]:
    return lambda materials: FixedPolicy(text_drafter(names, materials.engine.vocab_size))


def _all_text(materials: Materials) -> Policy:
    """What every stage builds on, alone, cut to the size that pays."""
    return FixedPolicy(GatedDrafter(materials.text_source()))


def _layerskip(materials: Materials) -> Policy:
    """A chain, as in the paper, for an exit's second choices cost more rows than they save; or the tree asked for."""
    chain = replace(_shape(materials), guesses=0, branching=1, shape=materials.options.draft_tree)
    return FixedPolicy(_judged(EarlyExitDrafter(chosen_exit(materials), None, chain), materials))


def _staged(materials: Materials) -> Policy:
    first = EarlyExitDrafter(chosen_exit(materials), materials.text_source(), _shape(materials))
    return FixedPolicy(_judged(first, materials))


def _judged(first: EarlyExitDrafter, materials: Materials) -> Drafter:
    """An exit's drafts, judged by the later exit if the user asks for one.

    Raises:
        UsageError: it is no inner exit, or not behind the first one.
    """
    wish, inner = materials.options.assistant_later_exit, materials.engine.exits[:-1]
    if wish is None:
        return first
    if wish not in inner or wish <= first.exit:
        later = ", ".join(str(exit_layer) for exit_layer in inner if exit_layer > first.exit) or "none"
        raise UsageError(
            f"--assistant-later-exit {wish}: this bundle's inner exits behind {first.exit} are: {later}",
            hint="export it with more --exits, or leave the flag out",
        )
    return EarlyExitDrafter(wish, first, _shape(materials))


def _draft_model(materials: Materials) -> Policy:
    if materials.draft_model is None:
        raise UsageError(
            "--strategy draft-model: no draft model given, and none in this bundle",
            hint="pass --assistant-model BUNDLE, or export with --draft CHECKPOINT",
        )
    return FixedPolicy(materials.draft_model(materials.text_source(), _shape(materials)))


def _auto(materials: Materials) -> Policy:
    make = materials.draft_model
    draft = None if make is None else lambda source: make(source, GrowthOptions())
    return AutoPolicy(
        materials.engine,
        materials.costs,
        materials.text_source(),
        materials.guide_drafter(),
        materials.record,
        draft,
    )


STRATEGIES: dict[str, Callable[[Materials], Policy]] = {
    "auto": _auto,
    "plain": _plain,
    "aggressive": _aggressive,
    "layerskip": _layerskip,
    "staged": _staged,
    "text": _all_text,
    "prompt-lookup": _prompt_lookup,
    "katz": _text("katz"),
    "recycling": _text("recycling"),
    "draft-model": _draft_model,
}


WITH_DRAFT_MODEL = ("auto", "draft-model")  # strategies that a draft model serves


def chosen_exit(materials: Materials) -> int:
    """The user's exit, else the first inner one.

    Raises:
        UsageError: not one of the bundle's inner exits, or the bundle has none.
    """
    inner, wish = materials.engine.exits[:-1], materials.options.assistant_early_exit
    if not inner or materials.engine.draft_vocabulary is None:
        raise UsageError(
            "this bundle has no early exits", hint="export it with --exits, or use --strategy prompt-lookup"
        )
    if wish is not None and wish not in inner:
        raise UsageError(
            f"--assistant-early-exit {wish}: this bundle's exits are {', '.join(map(str, inner))}"
        )
    return inner[0] if wish is None else wish


def _shape(materials: Materials) -> GrowthOptions:
    options, default = materials.options, GrowthOptions()
    return GrowthOptions(
        length=options.num_assistant_tokens,
        confidence=options.assistant_confidence_threshold or default.confidence,
    )
