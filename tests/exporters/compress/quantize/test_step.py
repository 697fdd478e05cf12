"""The step that fixes codes, on tiny models and, where rankings are concerned, on the shipped one."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from skipstone.errors import UsageError
from skipstone.exporters.checkpoint import load_eager, open_checkpoint
from skipstone.exporters.compress.activations import walk
from skipstone.exporters.compress.quantize import quantizer_names
from skipstone.exporters.compress.quantize.folds import apply_fold, folds_of, shared
from skipstone.exporters.compress.quantize.gguf_layout import gguf_types
from skipstone.exporters.compress.quantize.grid import dequantized
from skipstone.exporters.compress.quantize.plan import Place, layouts
from skipstone.exporters.compress.quantize.rank import changes, outliers, sensitivities
from skipstone.exporters.compress.quantize.step import Quantize
from skipstone.exporters.compress.recipe import parse_steps
from skipstone.exporters.compress.shapes import shape_of
from skipstone.exporters.compress.steps import Target
from skipstone.exporters.compress.work import Windows, Work
from skipstone.exporters.formats.gguf.parts import GgufModel
from skipstone.exporters.formats.gguf.schemes import SCHEMES
from skipstone.exporters.formats.gguf.whole import layout_of, write_whole
from skipstone.exporters.isolation import run_isolated
from tests.exporters.compress.test_activations import texts
from tests.exporters.conftest import MakeTiny


def work_on(folder: Path, sources: bool = False) -> Work:
    """A run over random text."""
    text = Windows(tuple(texts((60,) * 6)), tuple(texts((40,) * 6, seed=1)) if sources else None, "0")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Work(source=folder, target=Target(), tokenizer=tokenizer, text=text)


def logits(model: Any, work: Work) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(**inputs).logits[0] for inputs in work.calibration.inputs()])


@pytest.mark.parametrize("scheme", ["q8_0", "q4_0", "q5_k_m", "q4_k_m", "q2_k"])
@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_llama_cpp_gives_matrices_the_types_that_it_gives_the_whole_file(
    scheme: str, kind: str, tiny: MakeTiny, tiny_t5: MakeTiny, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny("llama-untied") if kind == "decoder" else tiny_t5("flan-t5"))
    write_whole(checkpoint, tmp_path / "whole.gguf")
    run_isolated(
        "skipstone.exporters.formats.gguf.schemes:quantize_file",
        source=str(tmp_path / "whole.gguf"),
        target=str(tmp_path / "small.gguf"),
        file_type=SCHEMES[scheme].file_type,
        imatrix=None,
        threads=1,
    )
    sources = layout_of(checkpoint).sources
    expected = {
        sources[name].name: part.type.name.lower()
        for name, part in GgufModel(tmp_path / "small.gguf").parts.items()
        if name in sources and part.type.name not in ("F32", "F16")
    }
    assert len(expected) > 20
    assert gguf_types(load_eager(checkpoint.path), SCHEMES[scheme]) == expected


@pytest.mark.parametrize("name", ["llama", "llama-biases", "qwen-3", "t5", "flan-t5"])
def test_scaled_channels_leave_the_model_as_it_is(name: str, tiny: MakeTiny, tiny_t5: MakeTiny) -> None:
    folder = tiny_t5(name) if "t5" in name else tiny(name)
    work, model = work_on(folder, "t5" in name), load_eager(folder)
    expected, made = logits(model, work), torch.Generator().manual_seed(3)
    before = copy.deepcopy(model.state_dict())
    for block in walk(model, work.calibration.windows, work.calibration.sources):
        inputs = dict(block.inputs)
        for fold in folds_of(block):
            columns = block.linears[fold.takers[0]].in_features
            scales = shared(fold, torch.exp(torch.randn(columns, generator=made)))
            inputs = apply_fold(block, fold, scales, inputs)
        again = next(
            found
            for found in walk(model, work.calibration.windows, work.calibration.sources)
            if found.name == block.name
        )
        for layer, found in inputs.items():
            torch.testing.assert_close(found.mean_abs, again.inputs[layer].mean_abs, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(found.norms, again.inputs[layer].norms, rtol=1e-3, atol=1e-4)
    changed = [key for key, weight in model.state_dict().items() if not torch.equal(weight, before[key])]
    assert len(changed) > 20
    torch.testing.assert_close(logits(model, work), expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("method", [*quantizer_names(), "awq", "smoothquant"])
@pytest.mark.parametrize("scheme", ["q4_0", "8da4w"])
def test_weights_become_what_their_codes_stand_for(method: str, scheme: str, tiny: MakeTiny) -> None:
    work, model = work_on(tiny("llama")), load_eager(tiny("llama"))
    details = Quantize(scheme=scheme, method=method).apply(model, work)
    weights = dict(model.named_parameters())
    assert len(work.codes) == 4 * 7 + 1
    for name, codes in work.codes.items():
        assert torch.equal(weights[name], dequantized(codes)), name
    assert all(0 < error < 0.1 for error in details["relative_error"].values())
    assert details["scheme"] == scheme


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_encoder_decoders_are_quantised_in_both_stacks(method: str, tiny_t5: MakeTiny) -> None:
    work, model = work_on(tiny_t5("flan-t5"), sources=True), load_eager(tiny_t5("flan-t5"))
    Quantize(scheme="q4_0", method=method).apply(model, work)
    weights = dict(model.named_parameters())
    assert {name.split(".")[0] for name in work.codes} == {"shared", "lm_head", "encoder", "decoder"}
    assert all(torch.equal(weights[name], dequantized(codes)) for name, codes in work.codes.items())


def test_gptq_strays_less_than_rounding(tiny: MakeTiny) -> None:
    work, strayed = work_on(tiny("gentle")), {}
    expected = logits(load_eager(tiny("gentle")), work).log_softmax(-1)
    for method in ("rtn", "gptq"):
        model = load_eager(tiny("gentle"))
        Quantize(scheme="q4_0", method=method, mix={"embed": "q8_0"}).apply(model, work)
        found = logits(model, work).log_softmax(-1)
        strayed[method] = float((expected.exp() * (expected - found)).sum(-1).mean())
    assert strayed["gptq"] < 0.8 * strayed["rtn"]


def test_places_get_the_layouts_of_their_own() -> None:
    step = parse_steps(["quantize:scheme=q4_0,mix=0-1:q8_0+down_proj:q5_0+1.o_proj:q6_k+embed:q4_1"])[0]
    assert isinstance(step, Quantize)
    assert step.mix == {"0-1": "q8_0", "down_proj": "q5_0", "1.o_proj": "q6_k", "embed": "q4_1"}


def test_later_places_go_before_earlier_ones(tiny: MakeTiny) -> None:
    mix = {"0-1": "q8_0", "down_proj": "q5_0", "1.o_proj": "q4_1", "embed": "q5_1"}
    found = layouts(load_eager(tiny("llama")), "q4_0", mix)
    assert found["model.layers.0.self_attn.q_proj.weight"] == "q8_0"
    assert found["model.layers.2.self_attn.q_proj.weight"] == "q4_0"
    assert found["model.layers.1.self_attn.o_proj.weight"] == "q4_1"
    assert {found[f"model.layers.{layer}.mlp.down_proj.weight"] for layer in range(4)} == {"q5_0"}
    assert found["model.embed_tokens.weight"] == "q5_1"


def test_a_float_part_of_a_mix_has_no_codes(tiny: MakeTiny) -> None:
    found = layouts(load_eager(tiny("llama-untied")), "8da4w", {"head": "8da8w", "0": "none"})
    assert not any(".layers.0." in name for name in found)
    assert found["lm_head.weight"] == "int8_channel"
    assert found["model.embed_tokens.weight"] == "int4_g32"


def test_a_table_that_serves_twice_with_two_layouts_is_left_to_the_exporter(tiny: MakeTiny) -> None:
    assert "model.embed_tokens.weight" not in layouts(load_eager(tiny("llama")), "8da8w", {})
    assert "model.embed_tokens.weight" in layouts(load_eager(tiny("llama-untied")), "8da8w", {})
    assert "model.embed_tokens.weight" in layouts(load_eager(tiny("llama")), "8da4w", {})
    assert "model.embed_tokens.weight" not in layouts(load_eager(tiny("llama")), "8da4w", {"head": "8da8w"})


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("quantize:scheme=q4_0,bits=4", "either scheme or bits"),
        ("quantize", "either scheme or bits"),
        ("quantize:scheme=f16", "has no codes to choose"),
        ("quantize:scheme=q4_0,method=best", "method 'best' is not known"),
        ("quantize:scheme=q4_0,mix=.:q8_0", "names no place"),
        ("quantize:scheme=q4_0,lower=q2_k", "lower and lowered go together"),
    ],
)
def test_options_that_do_not_fit_are_refused(flag: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_steps([flag])


@pytest.mark.parametrize(
    ("flag", "target", "message"),
    [
        ("scheme=q4_0", Target(format="executorch"), "q4_0 is a scheme of --format gguf"),
        ("scheme=8da4w", Target(format="onnx"), "the target is onnx"),
        ("scheme=q4_0", Target(format="gguf", scheme="q8_0"), "codes for q4_0, but --quantize q8_0"),
        ("bits=3", Target(format="executorch"), "has no scheme of that size"),
        ("scheme=int8,method=gptq", Target(), "int8's codes are chosen while the program is lowered"),
        ("scheme=q4_0,lower=q2_k,lowered=4", Target(), "the model has 4 layers"),
    ],
)
def test_what_the_target_cannot_carry_is_refused_before_work_starts(
    flag: str, target: Target, message: str, tiny: MakeTiny
) -> None:
    shape = shape_of(open_checkpoint(tiny("llama")))
    with pytest.raises(UsageError, match=message):
        parse_steps([f"quantize:{flag}"])[0].check(shape, target)


def test_codes_are_fixed_once(tiny: MakeTiny) -> None:
    shape = shape_of(open_checkpoint(tiny("llama")))
    step = parse_steps(["quantize:bits=4"])[0]
    with pytest.raises(UsageError, match="quantised already"):
        step.check(step.check(shape, Target()), Target())


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({"7": "q8_0"}, "7: the model has no such weights"),
        ({"0": "q9_0"}, "q9_0: no such storage layout"),
        ({"0": "q4_k"}, "has 64 columns, q4_k needs a multiple of 256"),
        ({"encoder.0": "q8_0"}, "the model has no such weights"),
    ],
)
def test_a_mix_that_does_not_fit_the_model_is_refused(
    mix: dict[str, str], message: str, tiny: MakeTiny
) -> None:
    with pytest.raises(UsageError, match=message):
        layouts(load_eager(tiny("llama")), "q4_0", mix)


def test_a_type_whose_codes_cannot_be_chosen_is_refused(tiny: MakeTiny) -> None:
    with pytest.raises(UsageError, match="would be stored as iq4_nl"):
        layouts(load_eager(tiny("llama")), "iq4_nl", {})


def test_smoothing_for_static_int8_moves_weights_and_fixes_no_codes(tiny: MakeTiny) -> None:
    work, model = work_on(tiny("llama")), load_eager(tiny("llama"))
    expected = logits(model, work)
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    Quantize(scheme="int8", method="smoothquant").apply(model, work)
    assert work.codes == {}
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    torch.testing.assert_close(logits(model, work), expected, rtol=1e-3, atol=1e-3)


def test_smoothing_balances_inputs_and_weights(tiny: MakeTiny) -> None:
    work, model = work_on(tiny("llama")), load_eager(tiny("llama"))
    Quantize(scheme="int8", fold="smoothquant").apply(model, work)
    block = next(walk(model, work.calibration.windows))
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        takers = ["q_proj", "k_proj", "v_proj"] if "q_proj" in name else ["down_proj"]
        found = torch.stack(
            [
                linear.weight.abs().amax(0)
                for taker, linear in block.linears.items()
                if taker.rsplit(".", 1)[-1] in takers
            ]
        ).amax(0)
        # With α = 1/2, max|x| s⁻¹ = max|w| s; folding V into O came later, and moved only rows.
        if name == "mlp.down_proj":
            torch.testing.assert_close(block.inputs[name].max_abs, found, rtol=1e-3, atol=1e-5)


def test_layers_that_count_least_are_lowered(tiny: MakeTiny) -> None:
    work, model = work_on(tiny("llama")), load_eager(tiny("llama"))
    scores = changes(model, work.calibration)
    details = Quantize(scheme="q8_0", lower="q4_0", lowered=2).apply(model, work)
    least = sorted(sorted(range(4), key=lambda layer: scores[layer])[:2])
    assert details["mix"] == {str(layer): "q4_0" for layer in least}
    for layer in range(4):
        grid = work.codes[f"model.layers.{layer}.mlp.up_proj.weight"].grid
        assert grid == ("q4_0" if layer in least else "q8_0")


def test_a_layer_that_changes_nothing_counts_least_by_every_ranking(tiny: MakeTiny) -> None:
    work, model = work_on(tiny("llama")), load_eager(tiny("llama"))
    with torch.no_grad():
        for part in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
            part.weight.mul_(1e-4)
    step = Quantize(scheme="q8_0", lower="q4_0", lowered=1)
    before = copy.deepcopy(model.state_dict())
    alone = sensitivities(model, work.calibration, lambda layer: step._lowered(model, "q8_0", layer))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert min(range(4), key=lambda layer: alone[layer]) == 2
    found = changes(model, work.calibration)
    assert min(range(4), key=lambda layer: found[layer]) == 2


def test_outliers_are_weights_beyond_one_deviation(tiny: MakeTiny) -> None:
    model = load_eager(tiny("llama"))
    with torch.no_grad():
        for part in model.model.layers[1].modules():
            if isinstance(part, torch.nn.Linear):
                part.weight.copy_(part.weight.sign())  # none lies beyond one deviation, to rounding
    shares = outliers(model)
    assert shares[1] != pytest.approx(shares[0], abs=0.05)
    assert shares[0] == pytest.approx(0.16, abs=0.03)  # of normal weights: 1 − Φ(1)


@pytest.mark.parametrize(
    "text", ["embed", "3", "0-2", "encoder.1", "down_proj", "0-2.down_proj", "encoder.0.q"]
)
def test_places_are_read(text: str) -> None:
    place = Place.parse(text)
    assert place.holds("decoder", 1, "mlp.down_proj") == (text in ("0-2", "down_proj", "0-2.down_proj"))
    assert place.holds("encoder", 1, "layer.0.SelfAttention.q") == (text == "encoder.1")
