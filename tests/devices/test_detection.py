"""Whether this machine has a device, with llama.cpp's registry replaced where another machine is needed."""

import platform

import pytest

from skipstone.devices import detection
from skipstone.devices.detection import Accelerator, Availability, detect, list_accelerators
from skipstone.devices.profiles import load_profile, profile_names
from skipstone.errors import EngineError


class Build:
    """A llama.cpp build with or without a GPU backend."""

    def __init__(self, *, gpu: bool) -> None:
        self.llama = self
        self.gpu = gpu

    def llama_supports_gpu_offload(self) -> bool:
        return self.gpu


def other_machine(monkeypatch: pytest.MonkeyPatch, found: list[Accelerator], *, gpu: bool) -> None:
    monkeypatch.setattr(detection, "library", lambda: Build(gpu=gpu))
    monkeypatch.setattr(detection, "list_accelerators", lambda: found)


def test_llama_cpp_lists_this_machines_cpu() -> None:
    processors = [device for device in list_accelerators() if device.backend == "CPU"]
    assert len(processors) == 1
    assert processors[0].description
    assert platform.machine()


def test_the_cpu_can_be_used_here() -> None:
    assert detect(load_profile("cpu")).usable


def test_every_answer_has_a_reason() -> None:
    assert all(detect(load_profile(name)).reason for name in profile_names())


def test_a_build_without_a_gpu_backend_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    other_machine(monkeypatch, [Accelerator("CPU", "a processor")], gpu=False)
    assert detect(load_profile("cpu")) == Availability(True, "a processor")
    for name in ("cuda", "vulkan", "metal"):
        here = detect(load_profile(name))
        assert not here.usable
        assert "no GPU backend" in here.reason


def test_a_gpu_of_another_backend_is_not_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Accelerator("CUDA", "a card"), Accelerator("CUDA", "another"), Accelerator("CPU", "a processor")]
    other_machine(monkeypatch, found, gpu=True)
    assert detect(load_profile("cuda")) == Availability(True, "a card; another")
    here = detect(load_profile("vulkan"))
    assert not here.usable
    assert "no Vulkan device" in here.reason
    assert "CPU, CUDA" in here.reason


@pytest.mark.parametrize("backend", ["MTL", "Metal"])
def test_metal_is_found_under_both_its_names(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    other_machine(monkeypatch, [Accelerator(backend, "an Apple GPU")], gpu=True)
    assert detect(load_profile("metal")).usable


def test_a_missing_engine_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise EngineError("llama-cpp-python cannot be loaded", hint="install it")

    monkeypatch.setattr(detection, "library", missing)
    here = detect(load_profile("cpu"))
    assert not here.usable
    assert "install it" in here.reason
