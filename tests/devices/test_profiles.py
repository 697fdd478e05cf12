"""Device profiles: complete, honest, and refused when they are not."""

from pathlib import Path

import pytest

from skipstone.devices import profiles
from skipstone.devices.profiles import load_profile, profile_names, read_profile
from skipstone.errors import DeviceError
from skipstone.exporters.formats import FORMATS
from skipstone.exporters.formats.gguf.schemes import SCHEMES
from skipstone.runtimes.engines import ENGINES

GOOD = """
name = "toaster"
title = "Toaster"
engine = "llamacpp"
backend = "CPU"
formats = ["gguf"]
default_quantize = "q8_0"
quantizations = ["q8_0"]
gpu_layers = 0
status = "not run"
verified = "Nothing."
"""


def test_every_file_of_the_folder_is_a_profile_of_its_name() -> None:
    files = {path.stem for path in Path(profiles.__file__).parent.glob("*.toml")}
    assert files == set(profile_names()) >= {"cpu", "cuda", "metal", "vulkan"}
    assert all(load_profile(name).name == name for name in files)


@pytest.mark.parametrize("name", profile_names())
def test_a_profile_names_only_what_exists(name: str) -> None:
    profile = load_profile(name)
    assert set(profile.quantizations) <= set(SCHEMES)
    assert profile.default_quantize in profile.quantizations
    assert set(profile.formats) <= set(FORMATS) & set(ENGINES)


@pytest.mark.parametrize("name", profile_names())
def test_a_profile_says_how_it_was_verified(name: str) -> None:
    profile = load_profile(name)
    assert profile.verified
    assert profile.sources
    assert (profile.status == "not run") == profile.verified.startswith("Nothing")


@pytest.mark.parametrize("name", ["toaster", "", "../cpu", "cpu.toml", "CPU"])
def test_an_unknown_device_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(DeviceError, match="unknown device") as refused:
        load_profile(name)
    assert refused.value.hint == "known: " + ", ".join(profile_names())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('status = "not run"', 'status = "surely"'), "status"),
        (('engine = "llamacpp"', 'engine = "steam"'), "engine"),
        (('formats = ["gguf"]', "formats = []"), "formats"),
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
