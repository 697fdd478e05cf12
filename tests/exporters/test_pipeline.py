"""Whole exports of tiny models of every architecture, and of inputs that cannot work."""

import json
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from skipstone.bundle import Bundle, open_bundle
from skipstone.errors import (
    BundleError,
    CheckpointError,
    DeviceError,
    ExportError,
    SkipstoneError,
    UsageError,
)
from skipstone.exporters import facts, isolation
from skipstone.exporters.checkpoint import open_checkpoint
from skipstone.exporters.formats import Step
from skipstone.exporters.formats.gguf import exporter
from skipstone.exporters.formats.gguf.vocabulary import tokenizer_keys
from skipstone.exporters.formats.gguf.whole import write_whole
from skipstone.exporters.pipeline import export_checkpoint
from skipstone.runtimes.engines import EngineOptions, open_engine
from skipstone.runtimes.session import Session
from tests.exporters.conftest import MakeTiny
from tests.exporters.tiny import CASES, VOCAB_SIZE, Case, make_checkpoint

TOKENS = [int(token) for token in np.random.default_rng(3).integers(2, VOCAB_SIZE, 40)]


def reference_logits(checkpoint: Path, tokens: Sequence[int]) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor([list(tokens)])).logits[0].numpy()


def bundle_logits(bundle: Bundle, tokens: Sequence[int]) -> np.ndarray:
    engine = open_engine(bundle, EngineOptions(kv_type="f32", threads=1))
    with Session(engine, 2 * len(tokens)) as session:
        rows = session.push(tokens)
        logits = np.stack(session.advance(rows, session.exits[-1]))
    engine.close()
    return logits


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_a_bundle_in_f32_gives_the_logits_of_eager_transformers(
    name: str, tiny: MakeTiny, tmp_path: Path
) -> None:
    exits = (4,) if name == "smollm-3" else (1, 3)
    bundle = export_checkpoint(tiny(name), tmp_path / "out", quantize="none", exits=exits)
    callback_free = name in ("llama", "llama-bf16", "llama-untied", "mistral", "smollm")
    inner = {segment.output for segment in bundle.manifest.segments[:-1]}
    assert inner == {"nextn" if callback_free else "callback"}
    np.testing.assert_allclose(bundle_logits(bundle, TOKENS), reference_logits(tiny(name), TOKENS), atol=2e-4)
    parity = bundle.manifest.parity
    assert parity.reference is not None
    assert parity.reference < 1e-4
    assert max(parity.split, parity.draft_verify, parity.width_noise) < 1e-4
    assert parity.agreement_with_reference == 1.0


@pytest.mark.parametrize(
    ("scheme", "largest"),
    [("f16", 1e-3), ("q8_0", 0.02), ("q6_k", 0.04), ("q4_0", 0.3), ("q4_k_m", 0.3), ("iq4_xs", 0.3)],
)
def test_a_quantised_bundle_stays_near_the_reference(
    scheme: str, largest: float, tiny: MakeTiny, tmp_path: Path
) -> None:
    bundle = export_checkpoint(tiny("gentle"), tmp_path / "out", quantize=scheme, exits=(2,))
    expected = reference_logits(tiny("gentle"), TOKENS)
    error = np.linalg.norm(bundle_logits(bundle, TOKENS) - expected) / np.linalg.norm(expected)
    assert 0 < error < largest
    assert bundle.manifest.quantization.scheme == scheme


def test_rows_that_do_not_fill_a_schemes_blocks_are_kept_in_another_type(tmp_path: Path) -> None:
    narrow = Case("LlamaForCausalLM", {"hidden_size": 80, "intermediate_size": 256}, scale=0.4)
    folder = make_checkpoint(tmp_path / "narrow", narrow)
    bundle = export_checkpoint(folder, tmp_path / "out", quantize="q6_k", exits=(2,))
    tensors = gguf.GGUFReader(bundle.file(bundle.manifest.segments[0].file)).tensors
    types = {tensor.name: tensor.tensor_type.name for tensor in tensors}
    assert (types["blk.0.ffn_up.weight"], types["blk.0.ffn_down.weight"]) == ("F16", "Q6_K")  # 80, 256
    assert types["blk.0.attn_output.weight"] == "Q8_0"  # 64
    expected = reference_logits(folder, TOKENS)
    error = np.linalg.norm(bundle_logits(bundle, TOKENS) - expected) / np.linalg.norm(expected)
    assert 0 < error < 0.04


def test_a_bundle_without_exits_is_one_segment_and_has_no_draft_head(tiny: MakeTiny, tmp_path: Path) -> None:
    manifest = export_checkpoint(tiny("llama"), tmp_path / "out", quantize="f32", exits=()).manifest
    assert (manifest.exits, manifest.draft_head) == ((), None)
    assert [segment.output for segment in manifest.segments] == ["logits"]


def test_the_manifest_tells_what_the_checkpoint_is(tiny: MakeTiny, tmp_path: Path) -> None:
    bundle = export_checkpoint(
        tiny("llama-3"), tmp_path / "out", quantize="q8_0", exits=(1,), draft_vocab_size=64
    )
    model = open_bundle(tmp_path / "out").manifest.model
    assert (model.name, model.architecture) == ("llama-3", "LlamaForCausalLM")
    assert (model.hidden_size, model.num_layers, model.vocab_size, model.context_length) == (
        64,
        4,
        VOCAB_SIZE,
        256,
    )
    reference = AutoModelForCausalLM.from_pretrained(tiny("llama-3"))
    assert model.parameters - 16 == reference.num_parameters()  # and 16 rotary factors
    assert (model.bos_token_id, model.eos_token_ids, model.add_bos) == (0, (0,), True)
    assert model.tied_embeddings is False
    assert model.chat_template == "{{ messages[0].content }}"
    assert bundle.manifest.draft_head is not None
    assert bundle.manifest.draft_head.rows == 64


def test_the_embedding_table_lies_where_the_manifest_says(tiny: MakeTiny, tmp_path: Path) -> None:
    bundle = export_checkpoint(tiny("llama-untied"), tmp_path / "out", quantize="f16", exits=(1,))
    entry = bundle.manifest.embedding
    table = np.memmap(
        bundle.file(entry.file), np.float16, "r", offset=entry.offset, shape=(entry.rows, entry.columns)
    )
    expected = open_checkpoint(tiny("llama-untied")).tensor("model.embed_tokens.weight").numpy()
    np.testing.assert_array_equal(table, expected.astype(np.float16))


def test_an_importance_matrix_changes_the_weights_and_is_recorded(tiny: MakeTiny, tmp_path: Path) -> None:
    text = tmp_path / "calibration.txt"
    text.write_text("def read(path):\n    return open(path).read()\n" * 40, encoding="utf-8")
    plain = export_checkpoint(tiny("gentle"), tmp_path / "plain", quantize="q4_0", exits=(2,)).manifest
    weighed = export_checkpoint(
        tiny("gentle"), tmp_path / "weighed", quantize="q4_0", exits=(2,), imatrix=text
    ).manifest
    assert plain.quantization.imatrix_sha256 is None
    assert weighed.quantization.imatrix_sha256 is not None
    first = {entry.path: entry.sha256 for entry in plain.files}
    second = {entry.path: entry.sha256 for entry in weighed.files}
    assert first["segment-0.gguf"] != second["segment-0.gguf"]


def test_exits_recorded_with_the_checkpoint_are_the_default(tiny: MakeTiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("llama"), tmp_path / "with-exits")
    (folder / "exits.json").write_text('{"exits": [3]}', encoding="utf-8")
    assert export_checkpoint(folder, tmp_path / "a", quantize="f32").manifest.exits == (3,)
    assert export_checkpoint(tiny("llama"), tmp_path / "b", quantize="f32").manifest.exits == (1,)


def test_progress_names_every_step_in_order(tiny: MakeTiny, tmp_path: Path) -> None:
    steps: list[Step] = []
    export_checkpoint(tiny("llama"), tmp_path / "out", quantize="q8_0", exits=(2,), progress=steps.append)
    assert [step.name for step in steps] == [
        "read",
        "write",
        "quantise",
        "split",
        "draft head",
        "hash",
        "self-test",
    ]
    assert [step.index for step in steps] == sorted(step.index for step in steps)


class TestFromGguf:
    """A .gguf as input."""

    @pytest.fixture
    def whole(self, tiny: MakeTiny, tmp_path: Path) -> Path:
        checkpoint = open_checkpoint(tiny("qwen-2"))
        write_whole(
            checkpoint, tmp_path / "whole.gguf", "f16", tokenizer=tokenizer_keys(checkpoint, VOCAB_SIZE)
        )
        return tmp_path / "whole.gguf"

    def test_it_gives_the_same_segments_as_the_checkpoint(
        self, whole: Path, tiny: MakeTiny, tmp_path: Path
    ) -> None:
        direct = export_checkpoint(tiny("qwen-2"), tmp_path / "a", quantize="f16", exits=(1, 2)).manifest
        through = export_checkpoint(whole, tmp_path / "b", exits=(1, 2)).manifest
        hashes = [
            {entry.path: entry.sha256 for entry in manifest.files if entry.path.startswith("segment")}
            for manifest in (direct, through)
        ]
        assert hashes[0] == hashes[1]
        assert (through.quantization.scheme, through.parity.reference) == ("f16", None)

    def test_it_is_quantised_when_asked(self, whole: Path, tmp_path: Path) -> None:
        manifest = export_checkpoint(whole, tmp_path / "out", quantize="q4_0", exits=(2,)).manifest
        assert manifest.quantization.scheme == "q4_0"

    def test_a_quantised_one_is_kept_and_not_requantised(self, whole: Path, tmp_path: Path) -> None:
        quantized = tmp_path / "q8.gguf"
        isolation.run_isolated(
            "skipstone.exporters.formats.gguf.schemes:quantize_file",
            source=str(whole),
            target=str(quantized),
            file_type=7,
            imatrix=None,
            threads=1,
        )
        assert (
            export_checkpoint(quantized, tmp_path / "out", exits=(2,)).manifest.quantization.scheme == "q8_0"
        )
        with pytest.raises(UsageError, match="quantised already"):
            export_checkpoint(quantized, tmp_path / "again", quantize="q4_0")

    def test_an_architecture_that_cannot_be_cut_is_named(self, tmp_path: Path) -> None:
        writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "mamba")
        writer.add_tensor("token_embd.weight", np.zeros((32, 32), np.float32))
        for step in (
            writer.write_header_to_file,
            writer.write_kv_data_to_file,
            writer.write_tensors_to_file,
            writer.close,
        ):
            step()
        with pytest.raises(CheckpointError, match=r"'mamba'.*llama, qwen2"):
            export_checkpoint(tmp_path / "odd.gguf", tmp_path / "out")

    @pytest.mark.parametrize("damage", ["empty", "text", "truncated", "huge count"])
    def test_a_damaged_file_is_refused(self, damage: str, whole: Path, tmp_path: Path) -> None:
        content = whole.read_bytes()
        damaged = {
            "empty": b"",
            "text": b"not a model",
            "truncated": content[: len(content) // 2],
            "huge count": content[:8] + struct.pack("<Q", 1 << 60) + content[16:],
        }[damage]
        (tmp_path / "bad.gguf").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"bad\.gguf"):
            export_checkpoint(tmp_path / "bad.gguf", tmp_path / "out")


class TestRefusals:
    """Input that cannot work leaves nothing behind."""

    @pytest.fixture(autouse=True)
    def _nothing_is_left(self, tmp_path: Path) -> None:
        self.output = tmp_path / "target" / "out"
        yield
        assert not self.output.exists()
        assert not self.output.parent.exists() or not list(self.output.parent.iterdir())

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"exits": (4,)}, UsageError, r"exit 4 is out of range for 4 layers"),
            ({"exits": (0,)}, UsageError, r"exit 0 is out of range"),
            ({"exits": (2, 2)}, UsageError, r"named twice"),
            ({"quantize": "q3_z"}, UsageError, r"--quantize q3_z: unknown scheme"),
            ({"format": "onyx"}, UsageError, r"--format onyx"),
            ({"device": "toaster"}, DeviceError, r"toaster"),
            ({"draft_vocab_size": 9999}, UsageError, r"--draft-vocab-size 9999"),
            ({"draft_text": "missing.txt"}, UsageError, r"--draft-text missing\.txt"),
            ({"imatrix": "missing.txt", "quantize": "q4_0"}, UsageError, r"--imatrix missing\.txt"),
            ({"imatrix": "missing.txt", "quantize": "f16"}, UsageError, r"nothing is quantised"),
        ],
    )
    def test_an_option_that_cannot_work_is_named(
        self, options: dict[str, object], error: type[SkipstoneError], message: str, tiny: MakeTiny
    ) -> None:
        with pytest.raises(error, match=message):
            export_checkpoint(tiny("llama"), self.output, **options)  # type: ignore[arg-type]

    def test_exits_that_break_smollm3s_pattern_are_refused(self, tiny: MakeTiny) -> None:
        with pytest.raises(UsageError, match="multiples of 4"):
            export_checkpoint(tiny("smollm-3"), self.output, exits=(2,))

    def test_a_missing_folder_is_named(self) -> None:
        with pytest.raises(CheckpointError, match=r"\./no/such/model"):
            export_checkpoint("./no/such/model", self.output)

    def test_a_hub_name_that_cannot_be_fetched_says_what_to_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(CheckpointError, match=r"nobody/nothing-here.*HF_HUB_OFFLINE"):
            export_checkpoint("nobody/nothing-here", self.output)

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (
                {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
                r"GPT2LMHeadModel is not supported.*Llama",
            ),
            (
                {"architectures": ["MT5ForConditionalGeneration"], "model_type": "mt5"},
                r"MT5.*encoder-decoder",
            ),
            ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, r"BertForMaskedLM does fill-mask"),
            ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'"),
            (
                {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
                r"rope_type 'dynamic'",
            ),
            ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised already"),
        ],
    )
    def test_a_model_that_has_no_mapping_is_named(
        self, edit: dict[str, object], message: str, tiny: MakeTiny, tmp_path: Path
    ) -> None:
        folder = shutil.copytree(tiny("llama"), tmp_path / "edited")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | edit))
        with pytest.raises(CheckpointError, match=message):
            export_checkpoint(folder, self.output)

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
    @pytest.mark.parametrize("damage", ["missing", "truncated"])
    def test_a_checkpoint_with_a_missing_or_truncated_file_is_refused(
        self, name: str, damage: str, tiny: MakeTiny, tmp_path: Path
    ) -> None:
        folder = shutil.copytree(tiny("llama"), tmp_path / "damaged")
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        if damage == "truncated":
            (folder / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(CheckpointError, match=r"damaged"):
            export_checkpoint(folder, self.output)

    def test_a_disk_too_small_is_noticed_before_writing(
        self, tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = shutil.disk_usage("/")
        monkeypatch.setattr(facts.shutil, "disk_usage", lambda _path: usage._replace(free=1000))
        with pytest.raises(ExportError, match=r"0\.0 GB free"):
            export_checkpoint(tiny("llama"), self.output)

    def test_a_disk_that_fills_up_while_writing_leaves_nothing(
        self, tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_arguments: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(exporter.cut, "write_segment", full)
        with pytest.raises(BundleError, match="No space left"):
            export_checkpoint(tiny("llama"), self.output)


def test_an_existing_bundle_is_replaced_only_when_asked(tiny: MakeTiny, tmp_path: Path) -> None:
    export_checkpoint(tiny("llama"), tmp_path / "out", quantize="f32", exits=(1,))
    with pytest.raises(BundleError, match="already holds a bundle"):
        export_checkpoint(tiny("llama"), tmp_path / "out", quantize="f32", exits=(2,))
    assert open_bundle(tmp_path / "out").manifest.exits == (1,)
    export_checkpoint(tiny("llama"), tmp_path / "out", quantize="f32", exits=(2,), overwrite=True)
    assert open_bundle(tmp_path / "out").manifest.exits == (2,)


def test_a_sliding_window_caps_the_context(tmp_path: Path) -> None:
    case = CASES["mistral"]
    windowed = type(case)(case.architecture, {**case.config, "sliding_window": 96})
    folder = make_checkpoint(tmp_path / "windowed", windowed)
    manifest = export_checkpoint(folder, tmp_path / "out", quantize="f32", exits=(1,)).manifest
    assert manifest.model.context_length == 96
