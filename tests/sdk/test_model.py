"""The facade: streaming, stop strings, the end of text, abandoned streams, full contexts, shared prefixes."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from skipstone.devices.curves import new_curve
from skipstone.errors import ContextFullError, UsageError, VocabularyMismatchError
from skipstone.model import Chunk, GenerationResult, Model, load_model
from skipstone.runtimes.engines import EngineOptions
from skipstone.runtimes.policies.arms import Record
from skipstone.runtimes.policies.auto import AutoPolicy
from skipstone.runtimes.sampling import SamplingConfig
from skipstone.runtimes.strategies import STRATEGIES, StrategyOptions
from tests.sdk.scripted import CHEAP_DRAFTS, EOS, ScriptedEngine, byte_tokenizer, write_bundle

ALONE = tuple(name for name in STRATEGIES if name not in ("draft-model", "aggressive"))
DRAFTING = tuple(name for name in ALONE if name != "plain")
PROMPT = "def read_lines(path):\n    with open(path) as stream:\n"
NEW = 40
FADED = 0.97  # what is left of a record after a generation that did not use it

MakeModel = Callable[..., Model]


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeModel]:
    """Models that say a given text after a prompt; the early exit is wrong at the positions in `misses`."""
    opened: list[Model] = []

    def make(prompt: str, following: Sequence[int], misses: Sequence[int] = (), context: int = 512) -> Model:
        script = [*byte_tokenizer().encode(prompt).ids, *following]
        engine = ScriptedEngine(script, misses)
        monkeypatch.setattr("skipstone.model.open_engine", lambda _bundle, _options: engine)
        monkeypatch.setattr("skipstone.model.measure", lambda _engine, **_: CHEAP_DRAFTS)
        monkeypatch.setattr("skipstone.model.try_builtin_texts", lambda *_: None)
        opened.append(Model(write_bundle(tmp_path / f"bundle-{len(opened)}"), context_length=context))
        return opened[-1]

    yield make
    for model in opened:
        model.close()


@pytest.fixture(scope="module")
def coder(coder_bundle_f32: Path) -> Iterator[Model]:
    with load_model(coder_bundle_f32, threads=1, context_length=256) as model:
        yield model


@pytest.fixture(scope="module")
def plain(coder: Model) -> GenerationResult:
    return coder.generate(PROMPT, max_new_tokens=NEW, strategy="plain", ignore_eos=True)


def run(
    model: Model, prompt: str, strategy: str, **arguments: object
) -> tuple[list[Chunk], GenerationResult]:
    chunks = list(model.stream(prompt, strategy=strategy, **arguments))
    assert model.last_result is not None
    return chunks, model.last_result


@pytest.mark.parametrize("strategy", ALONE)
def test_every_strategy_says_what_plain_decoding_says(
    coder: Model, plain: GenerationResult, strategy: str
) -> None:
    result = coder.generate(PROMPT, max_new_tokens=NEW, strategy=strategy, ignore_eos=True)
    assert result.tokens == plain.tokens
    assert result.text == plain.text == coder.codec.decode(plain.tokens)
    assert result.stop_reason == "length"
    assert result.stats.new_tokens == NEW
    assert result.stats.prompt_tokens == len(coder.codec.encode(PROMPT))


@pytest.mark.parametrize("strategy", ALONE)
def test_streamed_pieces_join_to_the_text(coder: Model, plain: GenerationResult, strategy: str) -> None:
    chunks, result = run(coder, PROMPT, strategy, max_new_tokens=NEW, ignore_eos=True)
    assert "".join(chunk.text for chunk in chunks) == result.text == plain.text
    assert [token for chunk in chunks for token in chunk.tokens] == list(plain.tokens)
    assert sum(chunk.accepted for chunk in chunks) == result.stats.accepted


@pytest.mark.parametrize("strategy", ALONE)
def test_no_streamed_piece_ends_inside_a_character(scripted: MakeModel, strategy: str) -> None:
    text = "naïve 日本語 🙂🙃 — Ωmega"
    model = scripted("say: ", list(text.encode()))
    chunks, result = run(model, "say: ", strategy)
    assert len(result.tokens) == len(text.encode()) + 1  # one token a byte, and EOS
    assert result.text == text
    so_far = ""
    for chunk in chunks:
        assert "\N{REPLACEMENT CHARACTER}" not in chunk.text
        so_far += chunk.text
        assert text.startswith(so_far)


@pytest.mark.parametrize("strategy", ALONE)
def test_a_character_cut_off_by_the_limit_becomes_a_replacement_character(
    scripted: MakeModel, strategy: str
) -> None:
    model = scripted("say: ", list("a🙂b".encode()))
    chunks, result = run(model, "say: ", strategy, max_new_tokens=3)
    assert result.stop_reason == "length"
    assert result.text == "a\N{REPLACEMENT CHARACTER}"
    assert "".join(chunk.text for chunk in chunks) == result.text


@pytest.mark.parametrize("strategy", ALONE)
@pytest.mark.parametrize("stop", ["END", "D🙂", "\n\nE"])
def test_a_stop_string_across_tokens_ends_the_text_before_it(
    scripted: MakeModel, strategy: str, stop: str
) -> None:
    text = "one EN\n\nEN two\n\nEND🙂 three"
    model = scripted("go ", list(text.encode()))
    chunks, result = run(model, "go ", strategy, stop=(stop, "never"))
    assert result.text == text[: text.index(stop)]
    assert result.stop_reason == "stop"
    assert "".join(chunk.text for chunk in chunks) == result.text


def test_text_held_back_for_a_stop_string_comes_out_at_the_end(scripted: MakeModel) -> None:
    model = scripted("go ", list(b"almost ST"))
    result = model.generate("go ", strategy="plain", stop=("STOP",))
    assert result.text == "almost ST"
    assert result.stop_reason == "eos"


def test_the_end_of_text_inside_an_accepted_run_ends_the_generation(scripted: MakeModel) -> None:
    following = [*b"abcdefgh", EOS, *b"not to be said"]
    outcomes = {}
    inside = False
    for strategy in ALONE:
        model = scripted("go ", following)
        chunks, result = run(model, "go ", strategy)
        outcomes[strategy] = (result.tokens, result.text, result.stop_reason)
        inside |= any(EOS in chunk.tokens[: chunk.accepted] for chunk in chunks)
    assert inside, "no strategy accepted the end of text as a draft: the test shows nothing"
    assert set(outcomes.values()) == {((*b"abcdefgh", EOS), "abcdefgh", "eos")}


def test_the_end_of_text_can_be_ignored(scripted: MakeModel) -> None:
    model = scripted("go ", [*b"ab", EOS, *b"cd"])
    result = model.generate("go ", max_new_tokens=5, ignore_eos=True)
    assert result.tokens == (*b"ab", EOS, *b"cd")
    assert result.stop_reason == "length"


def test_rejected_drafts_are_shown_and_not_said(scripted: MakeModel) -> None:
    prompt = "go "
    model = scripted(prompt, list(b"abcdefghijkl"), misses=[6])
    chunks, result = run(model, prompt, "layerskip", options=StrategyOptions(num_assistant_tokens=4))
    assert result.text == "abcdefghijkl"
    refused = [chunk.rejected for chunk in chunks if chunk.rejected]
    # position 6 is the d (after "go abc"), so e is drafted as f
    assert any(text.startswith("f") for text in refused)


@pytest.mark.parametrize("strategy", ALONE)
def test_an_abandoned_stream_leaves_the_model_as_it_was(
    coder: Model, plain: GenerationResult, strategy: str
) -> None:
    stream = coder.stream(PROMPT, max_new_tokens=NEW, strategy=strategy, ignore_eos=True)
    for _ in range(3):
        next(stream)
    stream.close()
    assert coder.last_result is None
    again = coder.generate(PROMPT, max_new_tokens=NEW, strategy=strategy, ignore_eos=True)
    assert again.tokens == plain.tokens


@pytest.mark.parametrize("strategy", ALONE)
def test_a_full_context_ends_the_generation(
    coder_bundle_f32: Path, plain: GenerationResult, strategy: str
) -> None:
    with load_model(coder_bundle_f32, threads=1, context_length=48) as model:
        result = model.generate(PROMPT, max_new_tokens=NEW, strategy=strategy, ignore_eos=True)
    assert result.stop_reason == "context"
    assert result.tokens == plain.tokens[: len(result.tokens)]
    # every position is used, and the last token needs none
    assert result.stats.prompt_tokens + len(result.tokens) == 48 + 1


@pytest.mark.parametrize("strategy", ["plain", "staged", "auto"])
def test_a_prompt_that_shares_its_beginning_gives_what_a_fresh_model_gives(
    coder: Model, coder_bundle_f32: Path, plain: GenerationResult, strategy: str
) -> None:
    longer = PROMPT + plain.text + "\n\ndef write_lines(path, lines):\n"
    coder.generate(PROMPT, max_new_tokens=NEW, strategy=strategy, ignore_eos=True)
    kept = coder.session.length
    reused = coder.generate(longer, max_new_tokens=16, strategy=strategy, ignore_eos=True)
    with load_model(coder_bundle_f32, threads=1, context_length=256) as fresh:
        expected = fresh.generate(longer, max_new_tokens=16, strategy="plain", ignore_eos=True)
    assert kept > len(coder.codec.encode(PROMPT))
    assert reused.tokens == expected.tokens


def test_the_same_prompt_again_computes_only_its_last_token(scripted: MakeModel) -> None:
    model = scripted("a long prompt ", list(b"text"))
    model.generate("a long prompt ", strategy="plain")
    computed: list[int] = []
    prefill = model.session.prefill

    def counting(tokens: Sequence[int]) -> object:
        computed.append(len(tokens))
        return prefill(tokens)

    model.session.prefill = counting  # type: ignore[method-assign, assignment]
    assert model.generate("a long prompt ", strategy="plain").text == "text"
    assert computed == [1]


def test_the_same_seed_draws_the_same_text_and_another_one_does_not(coder: Model) -> None:
    def sample(seed: int) -> tuple[int, ...]:
        sampling = SamplingConfig(temperature=1.0, seed=seed)
        return coder.generate(
            PROMPT, max_new_tokens=24, strategy="plain", sampling=sampling, ignore_eos=True
        ).tokens

    assert sample(3) == sample(3)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_a_prompt_that_does_not_fit_is_refused_and_the_model_stays_usable(
    coder: Model, plain: GenerationResult
) -> None:
    with pytest.raises(ContextFullError, match="256"):
        coder.generate("word " * 400)
    assert coder.generate(PROMPT, max_new_tokens=NEW, ignore_eos=True).tokens == plain.tokens


def test_arguments_that_cannot_work_are_refused(coder: Model) -> None:
    with pytest.raises(UsageError, match="empty"):
        coder.generate("")
    with pytest.raises(UsageError, match="max-new-tokens 0"):
        coder.generate(PROMPT, max_new_tokens=0)
    with pytest.raises(UsageError, match="guess: not known"):
        coder.generate(PROMPT, strategy="guess")
    with pytest.raises(UsageError, match="assistant-early-exit 11"):
        coder.generate(PROMPT, strategy="layerskip", options=StrategyOptions(assistant_early_exit=11))
    with pytest.raises(UsageError, match="assistant-model"):
        coder.generate(PROMPT, strategy="draft-model")


def test_a_draft_model_gives_plain_decodings_output(
    coder: Model, coder_bundle_f32: Path, plain: GenerationResult
) -> None:
    result = coder.generate(
        PROMPT,
        max_new_tokens=NEW,
        strategy="draft-model",
        assistant_model=str(coder_bundle_f32),
        ignore_eos=True,
    )
    assert result.tokens == plain.tokens
    assert result.stats.accepted > 0  # the model drafts for itself, so its drafts are right


def test_a_draft_model_of_another_vocabulary_is_refused(coder: Model, tmp_path: Path) -> None:
    other = write_bundle(tmp_path / "other")
    with pytest.raises(VocabularyMismatchError, match="257 tokens"):
        coder.generate(PROMPT, strategy="draft-model", assistant_model=str(other.path))


def test_closing_twice_does_no_harm(coder_bundle_f32: Path) -> None:
    model = load_model(coder_bundle_f32, threads=1, context_length=64)
    model.close()
    model.close()


def auto_record(model: Model) -> dict[str, Record]:
    policy = model.policy("auto")
    assert isinstance(policy, AutoPolicy)
    return {name: record for name, record in policy.record.items() if record.rounds}


def test_auto_begins_with_what_the_model_before_learned(scripted: MakeModel) -> None:
    text = list(range(32, 96)) * 5
    model = scripted(PROMPT, text)
    assert auto_record(model) == {}
    model.generate(PROMPT, max_new_tokens=len(text), ignore_eos=True)
    learned = auto_record(model)
    assert learned
    model.close()
    with Model(model.bundle, context_length=512) as again:
        assert auto_record(again).keys() == learned.keys()
        for name, record in auto_record(again).items():
            faded = learned[name].scaled(FADED)
            assert record.tokens == pytest.approx(faded.tokens, rel=0.01)
            assert record.price == pytest.approx(faded.price, rel=0.01)
    foreign = new_curve(model.bundle, model.engine, EngineOptions(), CHEAP_DRAFTS, 1.0)
    with Model(model.bundle, context_length=512, curve=foreign) as elsewhere:
        assert auto_record(elsewhere) == {}
