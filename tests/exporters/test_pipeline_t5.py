"""Whole exports of tiny T5s to GGUF, and of inputs that cannot work."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5ForConditionalGeneration

from samples.random_weights import main as random_weights
from skipstone.bundle import Bundle, GgufManifest, manifest_of, open_bundle
from skipstone.errors import BundleError, CheckpointError, ExportError, SkipstoneError, UsageError
from skipstone.exporters.formats.gguf import cut, cut_t5, t5
from skipstone.exporters.formats.gguf.cut import Cut
from skipstone.exporters.formats.gguf.parts import GgufModel, TensorPart, renamed
from skipstone.exporters.lexicon import LEXICON_FILE
from skipstone.exporters.pipeline import export_checkpoint
from skipstone.model import load_amendments, load_model
from skipstone.runtimes.drafters.lexicon import Lexicon
from skipstone.runtimes.engines import EngineOptions, open_engine
from skipstone.runtimes.session import Session
from tests.exporters.conftest import MakeTiny
from tests.exporters.tiny import VOCAB_SIZE
from tests.exporters.tiny_t5 import EOS, PAD, T5_CASES

_random = np.random.default_rng(3)
SOURCE = [*(int(token) for token in _random.integers(2, VOCAB_SIZE, 30)), EOS]
TOKENS = [PAD, *(int(token) for token in _random.integers(2, VOCAB_SIZE, 39))]


def reference_logits(checkpoint: Path, encoder_layers: int | None = None) -> np.ndarray:
    model = T5ForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    model.encoder.block = model.encoder.block[:encoder_layers]
    with torch.no_grad():
        return (
            model(input_ids=torch.tensor([SOURCE]), decoder_input_ids=torch.tensor([TOKENS]))
            .logits[0]
            .numpy()
        )


def bundle_logits(bundle: Bundle, stop_after: int | None = None) -> np.ndarray:
    engine = open_engine(bundle, EngineOptions(kv_type="f32", threads=1))
    with Session(engine, 2 * len(TOKENS)) as session:
        layers = session.encode(SOURCE, lambda exit_layer, _before, _after: exit_layer == stop_after)
        assert layers == (stop_after or engine.encoder.num_layers)
        logits = np.stack(session.advance(session.push(TOKENS), session.exits[-1]))
    engine.close()
    return logits


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("name", list(T5_CASES))
def test_a_t5_in_f32_gives_the_logits_of_eager_transformers(
    name: str, tiny_t5: MakeTiny, tmp_path: Path
) -> None:
    bundle = export_checkpoint(
        tiny_t5(name), tmp_path / "out", quantize="none", exits=(1, 2), encoder_exits=(1,)
    )
    expected = reference_logits(tiny_t5(name))
    assert expected.std() > 0.3
    np.testing.assert_allclose(bundle_logits(bundle), expected, atol=1e-4)
    parity = bundle.manifest.parity
    assert parity is not None
    assert parity.reference is not None
    assert max(parity.reference, parity.split, parity.draft_verify, parity.width_noise) < 1e-4
    assert parity.agreement_with_reference == 1.0


@pytest.mark.parametrize("exits", [(), (1,)])
def test_an_encoder_stopped_early_is_the_encoder_of_so_many_layers(
    exits: tuple[int, ...], tiny_t5: MakeTiny, tmp_path: Path
) -> None:
    bundle = export_checkpoint(
        tiny_t5("t5"), tmp_path / "out", quantize="f32", exits=exits, encoder_exits=(1, 3)
    )
    stopped = {layers: reference_logits(tiny_t5("t5"), layers) for layers in (1, 3, None)}
    for layers, expected in stopped.items():
        np.testing.assert_allclose(bundle_logits(bundle, layers), expected, atol=1e-4)
    assert np.abs(stopped[1] - stopped[3]).max() > 0.1
    assert np.abs(stopped[3] - stopped[None]).max() > 0.1


@pytest.mark.parametrize(
    ("scheme", "largest"), [("f16", 2e-3), ("q8_0", 0.03), ("q4_0", 0.3), ("q4_k_m", 0.3)]
)
def test_a_quantised_t5_stays_near_the_reference(
    scheme: str, largest: float, tiny_t5: MakeTiny, tmp_path: Path
) -> None:
    bundle = export_checkpoint(
        tiny_t5("gentle"), tmp_path / "out", quantize=scheme, exits=(1,), encoder_exits=(2,)
    )
    expected = reference_logits(tiny_t5("gentle"))
    error = np.linalg.norm(bundle_logits(bundle) - expected) / np.linalg.norm(expected)
    assert 0 < error < largest
    assert bundle.manifest.quantization.scheme == scheme


def test_the_manifest_tells_encoder_and_decoder_apart(tiny_t5: MakeTiny, tmp_path: Path) -> None:
    export_checkpoint(
        tiny_t5("flan-t5"),
        tmp_path / "out",
        quantize="q8_0",
        exits=(1,),
        encoder_exits=(1, 2),
        context_length=100,
        max_source_length=70,
    )
    manifest = manifest_of(open_bundle(tmp_path / "out"), GgufManifest)
    model, encoder = manifest.model, manifest.model.encoder
    assert encoder is not None
    assert (model.num_layers, model.context_length, model.tied_embeddings) == (3, 100, False)
    assert (encoder.num_layers, encoder.exits, encoder.max_source_length, encoder.start_token_id) == (
        4,
        (1, 2),
        70,
        PAD,
    )
    assert (model.bos_token_id, model.add_bos, model.eos_token_ids) == (None, False, (EOS,))
    assert [(part.first, part.stop) for part in manifest.encoder_segments] == [(0, 1), (1, 2), (2, 4)]
    assert [(part.first, part.stop) for part in manifest.segments] == [(0, 1), (1, 3)]
    reference = T5ForConditionalGeneration.from_pretrained(tiny_t5("flan-t5"))
    assert model.parameters == reference.num_parameters()


def test_a_lexicon_beside_the_checkpoint_comes_along_and_is_drafted_from(
    tiny_t5: MakeTiny, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(tiny_t5("t5"), tmp_path / "checkpoint")
    Lexicon({"the": 9, "list": 3}).save(checkpoint / LEXICON_FILE)
    bundle = export_checkpoint(checkpoint, tmp_path / "out", quantize="f32", exits=(1,))
    assert bundle.manifest.lexicon == LEXICON_FILE
    with load_model(bundle.path) as model:
        plain, drafted = (
            model.generate(source="teh lst", max_new_tokens=12, strategy=strategy, ignore_eos=True)
            for strategy in ("plain", "aggressive")
        )
        assert drafted.tokens == plain.tokens
        amendments = load_amendments(bundle, model.codec)
        assert amendments is not None
        amended = amendments.amended(model.codec.source("teh lst"))
        assert model.codec.decode(amended.tokens) == "The list"
    (checkpoint / LEXICON_FILE).write_text("[]")
    with pytest.raises(BundleError, match=r"lexicon\.json"):
        export_checkpoint(checkpoint, tmp_path / "other", quantize="f32", exits=(1,))
    assert not (tmp_path / "other").exists()


def test_exits_recorded_with_a_checkpoint_are_taken_for_both_stacks(
    tiny_t5: MakeTiny, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_t5("t5"), tmp_path / "recorded")
    (folder / "exits.json").write_text('{"exits": [2], "encoder_exits": [1, 3]}', encoding="utf-8")
    manifest = export_checkpoint(folder, tmp_path / "out", quantize="f32").manifest
    assert manifest.model.encoder is not None
    assert (manifest.exits, manifest.model.encoder.exits) == ((2,), (1, 3))


def test_every_weight_is_in_the_bundle_once(tiny_t5: MakeTiny, tmp_path: Path) -> None:
    """But for what is small and must be repeated: final norms, position biases. Idle layers are nearly nothing."""
    bundle = export_checkpoint(
        tiny_t5("t5"), tmp_path / "out", quantize="f32", exits=(1, 2), encoder_exits=(2,), draft_vocab_size=16
    )
    manifest = manifest_of(bundle, GgufManifest)
    files = [entry.file for entry in (*manifest.encoder_segments, *manifest.segments)]
    seen: dict[bytes, int] = {}
    idle = total = 0
    for file in files:
        for tensor in gguf.GGUFReader(bundle.file(file)).tensors:
            data = tensor.data.tobytes()
            total += len(data)
            if not any(data):
                idle += len(data)
            elif "norm" not in tensor.name and "attn_rel_b" not in tensor.name:
                seen[data] = seen.get(data, 0) + 1
    checkpoint = load_file(tiny_t5("t5") / "model.safetensors")
    matrices = [t for n, t in checkpoint.items() if t.ndim == 2 and "relative" not in n]
    assert sorted(seen.values()) == [1] * len(matrices)
    assert sum(len(data) for data in seen) == sum(t.numel() * 4 for t in matrices)
    assert idle < 0.1 * total


def swap_the_decoders_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(model: GgufModel, side: str, first: int, stop: int) -> list[TensorPart]:
        parts = right(model, side, first, stop)
        if side == "enc" or first == 0:
            return parts
        other = {"0": "1", "1": "0"}
        moved = [p for p in parts if "attn_rel_b" not in p.name]
        kept = [p for p in parts if "attn_rel_b" in p.name]
        return kept + [
            renamed(p, f"dec.blk.{other[p.name.split('.')[2]]}.{p.name.split('.', 3)[3]}") for p in moved
        ]

    right = cut_t5._blocks
    monkeypatch.setattr(cut_t5, "_blocks", swapped)


def lose_the_position_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(model: GgufModel, side: str, first: int, stop: int) -> list[TensorPart]:
        blank = np.zeros((32, 6), np.float32)
        return [
            TensorPart(p.name, p.shape, p.type, lambda: blank) if first and "attn_rel_b" in p.name else p
            for p in right(model, side, first, stop)
        ]

    right = cut_t5._blocks
    monkeypatch.setattr(cut_t5, "_blocks", without)


def shift_the_draft_heads_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cut.write_draft_head
    monkeypatch.setattr(cut, "write_draft_head", lambda model, ids, path: right(model, np.roll(ids, 1), path))


def write_other_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cut_t5.write_decoder_segment

    def other(model: GgufModel, piece: Cut, path: Path) -> None:
        moved = Cut(0, piece.stop - piece.first, piece.output)
        right(model, moved, path)

    monkeypatch.setattr(cut_t5, "write_decoder_segment", other)


def forget_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    right = t5._sources

    def plain(model: t5.EncoderDecoder, table: str) -> dict[str, t5.Source]:
        return {name: t5.Source(source.name) for name, source in right(model, table).items()}

    monkeypatch.setattr(t5, "_sources", plain)


BREAKS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "two layers swapped": swap_the_decoders_layers,
    "no position biases in later segments": lose_the_position_biases,
    "draft head's rows shifted": shift_the_draft_heads_rows,
    "other layers written": write_other_layers,
    "the head's scale forgotten": forget_the_scale,
}


@pytest.mark.parametrize("fault", list(BREAKS))
def test_a_broken_export_fails_its_self_test_and_leaves_nothing(
    fault: str, tiny_t5: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BREAKS[fault](monkeypatch)
    with pytest.raises(ExportError, match="self-test: "):
        export_checkpoint(tiny_t5("t5"), tmp_path / "out", quantize="f32", exits=(1,), encoder_exits=(2,))
    assert list(tmp_path.iterdir()) == []


def altered(folder: Path, target: Path, **config: object) -> Path:
    shutil.copytree(folder, target)
    content = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(content | config))
    return target


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"feed_forward_proj": "gated-silu", "dense_act_fn": "silu", "is_gated_act": True}, "gated-silu"),
        ({"relative_attention_max_distance": 64}, "relative_attention_max_distance is 64"),
        ({"decoder_start_token_id": None}, "decoder_start_token_id is None"),
        ({"d_ff": 96}, r"\[128, 64\].*\[96, 64\]"),
        ({"architectures": ["MT5ForConditionalGeneration"]}, "only T5ForConditionalGeneration"),
        ({"vocab_size": 100}, r"shared.weight has shape \[320, 64\].*\[100, 64\]"),
    ],
)
def test_a_t5_that_llama_cpp_would_compute_differently_is_refused(
    config: dict[str, object], message: str, tiny_t5: MakeTiny, tmp_path: Path
) -> None:
    folder = altered(tiny_t5("t5"), tmp_path / "odd", **config)
    generation = folder / "generation_config.json"
    if "decoder_start_token_id" in config:
        generation.unlink()
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(folder, tmp_path / "out", quantize="f32")
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_no_t5_has_is_refused_by_name(tiny_t5: MakeTiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_t5("t5"), tmp_path / "odd")
    weights = load_file(folder / "model.safetensors")
    bias = "encoder.block.1.layer.0.SelfAttention.q.bias"
    save_file(weights | {bias: torch.zeros(96)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"SelfAttention\.q\.bias"):
        export_checkpoint(folder, tmp_path / "out", quantize="f32")


def test_what_old_t5_checkpoints_store_twice_or_for_nothing_is_left_out(
    tiny_t5: MakeTiny, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_t5("t5"), tmp_path / "old")
    weights = load_file(folder / "model.safetensors")
    table = weights.pop("shared.weight")
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    copies = {"encoder.embed_tokens.weight": table, "decoder.embed_tokens.weight": table.clone()}
    save_file(
        weights | copies | {"lm_head.weight": table.clone(), unused: torch.ones(32, 6)},
        folder / "model.safetensors",
    )
    bundle = export_checkpoint(folder, tmp_path / "out", quantize="f32", exits=(1,))
    assert bundle.manifest.model.tied_embeddings
    np.testing.assert_allclose(bundle_logits(bundle), reference_logits(tiny_t5("t5")), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder_exits": (4,)}, "--encoder-exits 4: exit 4 is out of range for 4 layers"),
        ({"encoder_exits": (2, 2)}, "twice"),
        ({"exits": (3,)}, "--exits 3: exit 3 is out of range for 3 layers"),
        ({"max_source_length": 0}, "--max-source-length 0"),
        ({"context_length": 7}, "--context-length 7"),
        ({"imatrix": "text.txt"}, "--imatrix text.txt: importance matrices"),
    ],
)
def test_options_that_cannot_work_are_named(
    options: dict[str, object], message: str, tiny_t5: MakeTiny, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        export_checkpoint(tiny_t5("t5"), tmp_path / "out", quantize="q8_0", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options", [{"encoder_exits": (1,)}, {"max_source_length": 64}, {"context_length": 64}]
)
def test_an_encoders_options_are_refused_for_a_decoder_alone(
    options: dict[str, object], tiny: MakeTiny, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--" + next(iter(options)).replace("_", "-")):
        export_checkpoint(tiny("llama"), tmp_path / "out", quantize="f32", **options)


def test_an_encoder_decoder_as_gguf_is_refused(tiny_t5: MakeTiny, tmp_path: Path) -> None:
    from skipstone.exporters.checkpoint import open_checkpoint
    from skipstone.exporters.formats.gguf.whole import write_whole

    write_whole(open_checkpoint(tiny_t5("t5")), tmp_path / "whole.gguf", "f32")
    with pytest.raises(SkipstoneError, match="encoder-decoder as GGUF"):
        export_checkpoint(tmp_path / "whole.gguf", tmp_path / "out", quantize="f32")


def test_short_sources_and_contexts_are_kept_to(tiny_t5: MakeTiny, tmp_path: Path) -> None:
    bundle = export_checkpoint(
        tiny_t5("t5"), tmp_path / "out", quantize="f32", exits=(1,), context_length=16, max_source_length=8
    )
    engine = open_engine(bundle, EngineOptions(threads=1))
    with Session(engine) as session:
        assert session.context_length == 16
        session.encode(SOURCE[:8])
        with pytest.raises(SkipstoneError, match="source of 9 tokens"):
            session.encode(SOURCE[:9])
        session.encode(SOURCE[:8])
        assert session.prefill(TOKENS[:16]).shape == (VOCAB_SIZE,)
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["t5-small", "flan-t5-small", "codet5-small"])
def test_random_weights_in_the_published_shapes_export_and_run(shape: str, tmp_path: Path) -> None:
    folder = tmp_path / shape
    assert random_weights([shape, "--output", str(folder)]) == 0
    bundle = export_checkpoint(folder, tmp_path / "out", quantize="q8_0", exits=(2,), encoder_exits=(3,))
    expected = reference_logits(folder)
    found = bundle_logits(bundle)
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.05
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.8
    size, weights = sum(entry.size for entry in bundle.manifest.files), bundle.manifest.model.parameters
    assert size < 1.25 * weights  # 8.5 bits each, a draft head, idle layers
