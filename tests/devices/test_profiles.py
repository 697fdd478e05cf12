"""Device profiles: complete, honest, and refused when they are not."""

from pathlib import Path

import pytest

from skipstone.devices import profiles
from skipstone.devices.profiles import load_profile, profile_names, read_profile
from skipstone.errors import DeviceError, UsageError
from skipstone.exporters.formats import FORMATS
from skipstone.exporters.formats.coreml import schemes as coreml_schemes
from skipstone.exporters.formats.ethosu import schemes as ethosu_schemes
from skipstone.exporters.formats.executorch.targets import TARGETS
from skipstone.exporters.formats.gguf.schemes import SCHEMES
from skipstone.exporters.formats.onnx import targets as onnx_targets
from skipstone.runtimes.engines import ENGINES
from skipstone.runtimes.engines.onnxruntime.targets import TARGETS as SESSIONS

GOOD = """
name = "toaster"
title = "Toaster"

[formats.gguf]
engine = "llamacpp"
backend = "CPU"
quantizations = ["q8_0"]
gpu_layers = 0
status = "not run"
verified = "Nothing."
"""


def test_every_file_of_the_folder_is_a_profile_of_its_name() -> None:
    files = {path.stem for path in Path(profiles.__file__).parent.glob("*.toml")}
    assert files == set(profile_names()) >= {
        "cpu", "cuda", "metal", "vulkan", "android-cpu", "android-vulkan", "apple-coreml",
        "ethos-u85",
    }  # fmt: skip
    assert all(load_profile(name).name == name for name in files)


_ENGINES = {
    "gguf": "llamacpp",
    "executorch": "executorch",
    "onnx": "onnxruntime",
    "coreml": "coreml",
    "ethosu": "ethosu",
}
_SCHEMES_OF = {
    "llamacpp": lambda _backend: SCHEMES,
    "executorch": lambda target: TARGETS[target].schemes,
    "onnxruntime": lambda target: onnx_targets.TARGETS[target].schemes,
    "coreml": lambda _backend: coreml_schemes.SCHEMES,
    "ethosu": lambda _backend: ethosu_schemes.SCHEMES,
}


@pytest.mark.parametrize("name", profile_names())
def test_a_profile_names_only_what_exists(name: str) -> None:
    for format, support in load_profile(name).formats.items():
        assert format in FORMATS
        assert format in ENGINES
        assert support.engine == _ENGINES[format]
        assert set(support.quantizations) <= set(_SCHEMES_OF[support.engine](support.backend))
        assert support.default_quantize == support.quantizations[0]


@pytest.mark.parametrize("name", profile_names())
def test_a_profile_says_how_it_was_verified(name: str) -> None:
    profile = load_profile(name)
    assert profile.sources
    for support in profile.formats.values():
        assert support.verified
        assert (support.status == "not run") == support.verified.startswith("Nothing")


def test_every_target_of_executorch_has_a_device() -> None:
    profiles = map(load_profile, profile_names())
    formats = [profile.formats["executorch"] for profile in profiles if "executorch" in profile.formats]
    assert {support.backend for support in formats} == set(TARGETS)


def test_every_target_of_onnx_has_a_device_and_a_session() -> None:
    profiles = map(load_profile, profile_names())
    formats = [profile.formats["onnx"] for profile in profiles if "onnx" in profile.formats]
    assert {support.backend for support in formats} == set(onnx_targets.TARGETS)
    assert {target.name for target in onnx_targets.TARGETS.values()} == set(SESSIONS)


def test_a_device_takes_its_first_format_where_none_is_named() -> None:
    assert load_profile("cpu").choose_format(None) == "gguf"
    assert load_profile("cpu").choose_format("executorch") == "executorch"
    assert load_profile("apple-coreml").choose_format(None) == "executorch"


def test_a_format_that_a_device_lacks_is_refused_with_those_it_has() -> None:
    with pytest.raises(UsageError, match=r"--format gguf: --device android-vulkan takes executorch"):
        load_profile("android-vulkan").choose_format("gguf")
    with pytest.raises(UsageError, match=r"--format tflite: --device cpu takes gguf, executorch, onnx"):
        load_profile("cpu").choose_format("tflite")


@pytest.mark.parametrize("name", ["toaster", "", "../cpu", "cpu.toml", "CPU"])
def test_an_unknown_device_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(DeviceError, match="unknown device") as refused:
        load_profile(name)
    assert refused.value.hint == "known: " + ", ".join(profile_names())


@pytest.mark.parametrize("status", ["runs", "emulated", "estimated", "compiled", "not run"])
def test_a_status_says_how_far_a_device_was_tried(tmp_path: Path, status: str) -> None:
    path = tmp_path / "toaster.toml"
    path.write_text(GOOD.replace("not run", status))
    assert read_profile(path).formats["gguf"].status == status


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('status = "not run"', 'status = "surely"'), "status"),
        (('engine = "llamacpp"', 'engine = "steam"'), "engine"),
        (("quantizations", "colours"), "formats.gguf.quantizations"),
        (("gpu_layers = 0", "gpu_layers = -7"), "gpu_layers"),
        (('verified = "Nothing."', ""), "verified"),
        (('title = "Toaster"', 'title = "Toaster"\nslots = 2'), "slots"),
        (('name = "toaster"', 'name = "kettle"'), "kettle"),
        (('name = "toaster"', "name = "), "not a readable profile"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused_by_key(
    tmp_path: Path, change: tuple[str, str], said: str
) -> None:
    path = tmp_path / "toaster.toml"
    path.write_text(GOOD)
    assert read_profile(path).title == "Toaster"
    path.write_text(GOOD.replace(*change))
    with pytest.raises(DeviceError, match=said):
        read_profile(path)
