"""Random checkpoints have the published models' configurations and sizes, and load."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from samples.random_weights import SHAPES, main, published_config, random_model, write_random
from skipstone.errors import CheckpointError, UsageError
from skipstone.exporters.checkpoint import open_checkpoint

CODER = Path(__file__).parents[2] / "samples/models/coder"

# What the models' own config.json files say, in the form of the transformers release they were written with.
PUBLISHED = {
    "llama-3.2-1b": """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 128000,
        "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
        "tie_word_embeddings": true, "vocab_size": 128256}""",
    "qwen3-0.6b": """{"architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "bos_token_id": 151643,
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
        "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": true,
        "use_sliding_window": false, "vocab_size": 151936}""",
    "smollm2-135m": """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 0,
        "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536, "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 9,
        "num_hidden_layers": 30, "num_key_value_heads": 3, "rms_norm_eps": 1e-05, "rope_scaling": null,
        "rope_theta": 100000, "tie_word_embeddings": true, "vocab_size": 49152}""",
    "t5-small": """{"architectures": ["T5ForConditionalGeneration"], "d_ff": 2048, "d_kv": 64, "d_model": 512,
        "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1, "initializer_factor": 1.0,
        "is_encoder_decoder": true, "layer_norm_epsilon": 1e-06, "model_type": "t5", "n_positions": 512, "num_heads": 8,
        "num_layers": 6, "pad_token_id": 0, "relative_attention_num_buckets": 32, "vocab_size": 32128}""",
    "flan-t5-small": """{"architectures": ["T5ForConditionalGeneration"], "d_ff": 1024, "d_kv": 64, "d_model": 512,
        "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1, "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0, "is_encoder_decoder": true, "layer_norm_epsilon": 1e-06, "model_type": "t5",
        "n_positions": 512, "num_decoder_layers": 8, "num_heads": 6, "num_layers": 8, "pad_token_id": 0,
        "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32, "tie_word_embeddings": false,
        "use_cache": true, "vocab_size": 32128}""",
    "codet5-small": """{"architectures": ["T5ForConditionalGeneration"], "bos_token_id": 1, "d_ff": 2048, "d_kv": 64,
        "d_model": 512, "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 2, "feed_forward_proj": "relu",
        "initializer_factor": 1.0, "is_encoder_decoder": true, "layer_norm_epsilon": 1e-06, "model_type": "t5",
        "n_positions": 512, "num_decoder_layers": 6, "num_heads": 8, "num_layers": 6, "pad_token_id": 0,
        "relative_attention_num_buckets": 32, "use_cache": true, "vocab_size": 32100}""",
}
PARAMETERS = {
    "llama-3.2-1b": 1_235_814_400,
    "qwen3-0.6b": 596_049_920,
    "smollm2-135m": 134_515_008,
    "t5-small": 60_506_624,
    "flan-t5-small": 76_961_152,
    "codet5-small": 60_492_288,
}


def without_notes(config: PretrainedConfig) -> dict[str, object]:
    notes = ("transformers_version", "_name_or_path", "dtype", "rope_scaling")
    return {name: value for name, value in config.to_dict().items() if name not in notes}


def on_no_device(config: PretrainedConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return random_model(config)


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "smol"
    assert main(["smollm2-135m", "--layers", "1", "--output", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_configuration_is_what_the_models_own_file_says(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(PUBLISHED[name], encoding="utf-8")
    assert without_notes(published_config(name)) == without_notes(AutoConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_model_has_as_many_parameters_as_published(name: str) -> None:
    model = on_no_device(published_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_a_cut_takes_whole_layers_out_and_nothing_else() -> None:
    whole, cut = (on_no_device(published_config("qwen3-0.6b", layers)) for layers in (None, 3))
    shapes = {name: tuple(parameter.shape) for name, parameter in whole.named_parameters()}
    kept = {name: tuple(parameter.shape) for name, parameter in cut.named_parameters()}
    gone = tuple(f"model.layers.{layer}." for layer in range(3, 28))
    assert kept == {name: shape for name, shape in shapes.items() if not name.startswith(gone)}


def test_a_cut_encoder_decoder_has_so_many_layers_on_either_side(tmp_path: Path) -> None:
    assert main(["flan-t5-small", "--layers", "2", "--output", str(tmp_path / "flan")]) == 0
    checkpoint = open_checkpoint(tmp_path / "flan")
    assert (checkpoint.config.num_layers, checkpoint.config.num_decoder_layers) == (2, 2)
    head, table = (checkpoint.tensor(name) for name in ("lm_head.weight", "shared.weight"))
    assert not head.equal(table)
    assert float(head.float().std()) == pytest.approx(1.0, rel=0.01)


def test_the_written_folder_is_a_checkpoint_with_the_cut_on_record(smol: Path) -> None:
    checkpoint = open_checkpoint(smol)
    assert (checkpoint.architecture, checkpoint.config.num_hidden_layers) == ("LlamaForCausalLM", 1)
    assert checkpoint.stored_type("model.embed_tokens.weight") == "BF16"
    model = AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32)
    # 49,152 · 576 embeddings; attention 576 · (576 + 192 + 192 + 576), feed-forward 3 · 576 · 1,536; three norms
    assert model.num_parameters() == 49152 * 576 + 576 * 1536 + 3 * 576 * 1536 + 3 * 576
    with torch.no_grad():
        logits = model(torch.arange(10)[None]).logits
    assert logits.shape == (1, 10, 49152)
    assert bool(logits.isfinite().all())


def test_the_weights_are_drawn_as_the_configuration_says(smol: Path) -> None:
    with safe_open(smol / "model.safetensors", framework="pt") as stored:
        embedding = stored.get_tensor("model.embed_tokens.weight").float()
        norm = stored.get_tensor("model.norm.weight").float()
    assert float(embedding.std()) == pytest.approx(1 / 24, rel=0.01)
    assert abs(float(embedding.mean())) < 1e-3
    assert bool((norm == 1).all())


def test_a_seed_says_what_the_weights_are_and_leaves_torchs_generator_alone(
    smol: Path, tmp_path: Path
) -> None:
    state = torch.random.get_rng_state()
    for name, seed in (("same", "0"), ("other", "1")):
        arguments = ["smollm2-135m", "--layers", "1", "--output", str(tmp_path / name), "--seed", seed]
        assert main(arguments) == 0
    assert bool((torch.random.get_rng_state() == state).all())
    first, same, other = (
        (folder / "model.safetensors").read_bytes()
        for folder in (smol, tmp_path / "same", tmp_path / "other")
    )
    assert first == same
    assert first != other


def test_a_residual_scale_changes_what_the_layers_add_and_nothing_else(smol: Path, tmp_path: Path) -> None:
    arguments = ["smollm2-135m", "--layers", "1", "--output", str(tmp_path / "calm")]
    assert main([*arguments, "--residual-scale", "0.25"]) == 0
    plain, calm = (load_file(folder / "model.safetensors") for folder in (smol, tmp_path / "calm"))
    assert plain.keys() == calm.keys()
    outputs = {"model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight"}
    for name, weight in plain.items():
        torch.testing.assert_close(calm[name], weight * 0.25 if name in outputs else weight, rtol=0, atol=0)


def test_the_folder_holds_what_transformers_writes_and_the_tokenizer(tmp_path: Path) -> None:
    write_random(published_config("smollm2-135m", 1), CODER, tmp_path / "out")
    files = {file.name for file in (tmp_path / "out").iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors"}
    assert files == expected | {"tokenizer.json", "tokenizer_config.json"}
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (CODER / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("layers", [0, -1, 31])
def test_layers_that_the_model_does_not_have_are_refused(layers: int) -> None:
    with pytest.raises(UsageError, match=f"--layers {layers}: smollm2-135m has 1 to 30"):
        published_config("smollm2-135m", layers)


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(UsageError, match=r"qwen3-0\.6b"):
        published_config("gpt-5")


def test_what_cannot_work_is_said_in_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    cases = {
        "exists already": ["--output", str(tmp_path / "there")],
        "tokenizer.json: not found": [
            "--output",
            str(tmp_path / "out"),
            "--tokenizer",
            str(tmp_path / "there"),
        ],
        "not a readable tokenizer": [
            "--output",
            str(tmp_path / "out"),
            "--tokenizer",
            str(tmp_path / "broken"),
        ],
        "--layers 99": ["--output", str(tmp_path / "out"), "--layers", "99"],
    }
    for words, arguments in cases.items():
        assert main(["smollm2-135m", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert words in error
    assert {entry.name for entry in tmp_path.iterdir()} == {"there", "broken"}
    assert list((tmp_path / "there").iterdir()) == []


def test_a_tokenizer_that_knows_more_than_the_model_is_refused(tmp_path: Path) -> None:
    shutil.copytree(CODER, tmp_path / "more", ignore=shutil.ignore_patterns("*.safetensors"))
    tokenizer = json.loads((tmp_path / "more" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["far out"] = 49152
    (tmp_path / "more" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="gives token 49152, the model's vocabulary has 49152"):
        write_random(published_config("smollm2-135m", 1), tmp_path / "more", tmp_path / "out")
    assert not (tmp_path / "out").exists()
