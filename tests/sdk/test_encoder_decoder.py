"""The facade on encoder-decoders: sources, what is refused, what is not read twice, texts of any length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skipstone.errors import ContextFullError, UsageError
from skipstone.inputs import ModelInput, encode_input
from skipstone.model import Model
from skipstone.rewrite import rewrite
from skipstone.runtimes.adaptive import AdaptiveOptions
from skipstone.runtimes.sampling import SamplingConfig
from skipstone.runtimes.strategies import STRATEGIES, StrategyOptions
from tests.sdk.scripted import CHEAP_DRAFTS, ENCODER, EOS, ScriptedEngine, ScriptedTranslator, write_bundle

ALONE = tuple(name for name in STRATEGIES if name != "draft-model")
SOURCE = "Their is a eror in teh text."
ANSWER = "There is an error in the text."
MakeTranslator = Callable[..., tuple[Model, ScriptedTranslator]]


def correct(source: bytes) -> bytes:
    for wrong, right in ((b"Their is a eror", b"There is an error"), (b"teh", b"the")):
        source = source.replace(wrong, right)
    return source


@pytest.fixture
def translator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeTranslator]:
    opened: list[Model] = []

    def make(
        answer: Callable[[bytes], bytes] = correct, context: int = 512
    ) -> tuple[Model, ScriptedTranslator]:
        engine = ScriptedTranslator(answer)
        monkeypatch.setattr("skipstone.model.open_engine", lambda _bundle, _options: engine)
        monkeypatch.setattr("skipstone.model.measure", lambda _engine, **_: CHEAP_DRAFTS)
        monkeypatch.setattr("skipstone.model.try_builtin_texts", lambda *_: None)
        bundle = write_bundle(tmp_path / f"bundle-{len(opened)}", encoder=ENCODER)
        opened.append(Model(bundle, context_length=context))
        return opened[-1], engine

    yield make
    for model in opened:
        model.close()


@pytest.fixture
def model(translator: MakeTranslator) -> Model:
    return translator()[0]


@pytest.mark.parametrize("strategy", ALONE)
def test_every_strategy_says_what_the_source_asks_for(model: Model, strategy: str) -> None:
    for _ in range(2):
        result = model.generate(source=SOURCE, strategy=strategy)
        assert result.text == ANSWER
        assert result.tokens == (*ANSWER.encode(), EOS)
        assert result.stop_reason == "eos"
    stats = result.stats
    assert (stats.source_tokens, stats.prompt_tokens, stats.encoder_layers) == (len(SOURCE) + 1, 1, 2)


@pytest.mark.parametrize("strategy", ALONE)
def test_streamed_pieces_join_to_the_text_and_an_abandoned_stream_does_no_harm(
    model: Model, strategy: str
) -> None:
    stream = model.stream(source="something else", strategy=strategy)
    next(stream)
    stream.close()
    assert "".join(chunk.text for chunk in model.stream(source=SOURCE, strategy=strategy)) == ANSWER


def test_aggressive_drafts_are_accepted_up_to_each_correction(model: Model) -> None:
    stats = model.generate(source=SOURCE, strategy="aggressive").stats
    assert stats.accepted > len(ANSWER) / 2
    assert stats.tokens_per_round > 3
    assert set(stats.rounds_by_drafter) == {"aggressive"}


def test_an_answer_like_its_source_takes_one_round_of_drafts(translator: MakeTranslator) -> None:
    text = "Nothing is wrong here."  # as long as one draft of the measured widths
    stats = translator(bytes)[0].generate(source=text, strategy="aggressive").stats
    assert (stats.new_tokens, stats.rounds, stats.accepted) == (len(text) + 1, 1, len(text))


def test_the_same_source_again_is_not_read_again(translator: MakeTranslator) -> None:
    model, engine = translator()
    for source in (SOURCE, SOURCE, "Another text.", SOURCE):
        model.generate(source=source, strategy="plain")
    assert engine.sources == [SOURCE.encode(), b"Another text.", SOURCE.encode()]


def test_token_ids_serve_as_a_source(model: Model) -> None:
    assert model.generate(source=[*SOURCE.encode(), EOS], strategy="auto").text == ANSWER


def test_the_output_can_be_made_to_begin_with_given_words(model: Model) -> None:
    result = model.generate("There is", source=SOURCE, strategy="aggressive")
    assert result.text == " an error in the text."
    assert result.stats.prompt_tokens == 1 + len("There is")


def test_a_guide_is_drafted_from(translator: MakeTranslator) -> None:
    model, _ = translator(lambda _source: b"Dear reader, good bye.")
    options = StrategyOptions(guide="Dear writer, good bye.")
    guided = model.generate(source="x", strategy="aggressive", options=options)
    assert guided.text == "Dear reader, good bye."
    unguided = model.generate(source="x", strategy="aggressive")
    assert guided.stats.rounds < unguided.stats.rounds


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, UsageError, "needs a text to read.*--source"),
        ({"prompt": "a prompt alone"}, UsageError, "needs a text to read.*--source"),
        ({"source": ""}, UsageError, "the source is empty"),
        ({"source": []}, UsageError, "the source is empty"),
        ({"source": "x", "prompt": ""}, UsageError, "the prompt is empty"),
        ({"source": [5, 999]}, UsageError, "token 999"),
        ({"source": "x" * 120}, ContextFullError, "121 tokens.*takes 120.*sentences"),
    ],
)
def test_what_an_encoder_decoder_cannot_read_is_refused_and_the_model_stays_usable(
    model: Model, arguments: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        model.generate(**arguments)  # type: ignore[arg-type]
    assert model.generate(source=SOURCE).text == ANSWER


def test_a_decoder_takes_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine([*b"go text"])
    monkeypatch.setattr("skipstone.model.open_engine", lambda _bundle, _options: engine)
    monkeypatch.setattr("skipstone.model.measure", lambda _engine, **_: CHEAP_DRAFTS)
    with Model(write_bundle(tmp_path)) as model:
        for arguments in ({"source": "x"}, {"prompt": "go ", "source": "x"}):
            with pytest.raises(UsageError, match=r"decoder alone.*--prompt"):
                model.generate(**arguments)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="decoder alone"):
            next(rewrite(model, "text"))
        assert model.generate("go ").text == "text"


def test_a_source_gets_the_tokenizers_end_and_a_prompt_the_start_token(model: Model) -> None:
    found = encode_input(model.codec, model.bundle.manifest.model, "ab", "c")
    assert found == ModelInput((ENCODER.start_token_id, *b"ab"), (*b"c", EOS))


# --- texts of any length ---


@given(text=st.text(max_size=60) | st.text(alphabet="ab. \n\tteh\x00🙂中ا", max_size=120))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_a_text_that_needs_no_correction_comes_back_as_it_was(translator: MakeTranslator, text: str) -> None:
    model = _identity(translator)
    pieces = list(rewrite(model, text, strategy="aggressive"))
    assert "".join(piece.before for piece in pieces) == text
    assert "".join(piece.after for piece in pieces) == text


_MADE: dict[int, Model] = {}


def _identity(translator: MakeTranslator) -> Model:
    """One model for all examples of a test."""
    if id(translator) not in _MADE:
        _MADE.clear()
        _MADE[id(translator)] = translator(bytes)[0]
    return _MADE[id(translator)]


def test_every_sentence_is_corrected_and_the_space_between_them_kept(model: Model) -> None:
    text = f"  {SOURCE}\n\n\t{SOURCE}  A fine one.\r\n{SOURCE}\n"
    pieces = list(rewrite(model, text))
    assert "".join(piece.after for piece in pieces) == text.replace(SOURCE, ANSWER)
    assert sum(piece.before != piece.after for piece in pieces) == 3


def test_an_answer_without_an_end_leaves_the_text_as_it_was(translator: MakeTranslator) -> None:
    model, _ = translator(lambda source: source * 4)
    (piece,) = rewrite(model, "One sentence.")
    assert piece.after == "One sentence."
    assert piece.result is not None
    assert piece.result.stop_reason == "length"


def test_an_answer_in_bytes_that_are_no_text_leaves_the_text_as_it_was(translator: MakeTranslator) -> None:
    model, _ = translator(lambda source: source.replace(b"n", b"\xff", 1))
    text = "A \ufffd without. One sentence."
    pieces = list(rewrite(model, text))
    assert "".join(piece.after for piece in pieces) == text
    assert pieces[-1].result is not None
    assert "\ufffd" in pieces[-1].result.text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["junk", "prose", "one word"])
def test_a_megabyte_is_rewritten_and_nothing_lost(translator: MakeTranslator, kind: str) -> None:
    model, engine = translator(bytes)
    junk = np.random.default_rng(0).integers(0, 256, 600_000, np.uint8).tobytes().decode("utf-8", "replace")
    text = {"junk": junk, "prose": (SOURCE + " ") * 34_000, "one word": "x" * 1_000_000}[kind]
    text = text[: 1_000_000 if kind == "junk" else 60_000]
    pieces = list(rewrite(model, text, strategy="aggressive"))
    assert "".join(piece.after for piece in pieces) == text
    assert max(map(len, engine.sources)) < ENCODER.max_source_length


# --- lossy modes ---


def test_leaving_the_decoder_early_is_lossy_and_says_so(model: Model) -> None:
    result = model.generate(source=SOURCE, adaptive=AdaptiveOptions(early_exit_margin=0.5))
    assert result.text == ANSWER  # the scripted exit is never wrong
    assert result.stats.lossy
    assert result.stats.rounds_by_drafter == {"exit 1": len(ANSWER)}
    assert not model.generate(source=SOURCE).stats.lossy


def test_after_a_lossy_reading_the_source_is_read_again_in_full(translator: MakeTranslator) -> None:
    model, engine = translator()
    adaptive = AdaptiveOptions(encoder_saturation=0.9)
    assert model.generate(source=SOURCE, adaptive=adaptive).stats.lossy
    model.session._encoder_layers = 1  # as an encoder with exits would say
    assert model.generate(source=SOURCE).stats.encoder_layers == 2
    assert len(engine.sources) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"strategy": "aggressive"}, "--strategy aggressive"),
        ({"sampling": SamplingConfig(temperature=1.0)}, "greedily"),
        ({"sampling": SamplingConfig(repetition_penalty=1.3)}, "greedily"),
    ],
)
def test_what_does_not_go_with_leaving_early_is_refused(
    model: Model, arguments: dict[str, object], words: str
) -> None:
    with pytest.raises(UsageError, match=f"--early-exit-margin.*{words}"):
        model.generate(source=SOURCE, adaptive=AdaptiveOptions(early_exit_margin=0.5), **arguments)  # type: ignore[arg-type]


def test_what_was_learned_with_one_guide_serves_the_next(model: Model) -> None:
    one, other = (model.policy("aggressive", StrategyOptions(guide=text)) for text in ("abc", "xyz"))
    assert one is other
    assert model.policy("aggressive") is not one
