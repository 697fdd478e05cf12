"""Whether this machine has a device, with llama.cpp's registry replaced where another machine is needed."""

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

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
    monkeypatch.setattr(platform, "system", lambda: "Darwin")  # where every device of llama.cpp may be


def test_llama_cpp_lists_this_machines_cpu() -> None:
    processors = [device for device in list_accelerators() if device.backend == "CPU"]
    assert len(processors) == 1
    assert processors[0].description
    assert platform.machine()


def test_the_cpu_can_be_used_here() -> None:
    assert detect(load_profile("cpu"), "gguf").usable


def test_every_answer_has_a_reason() -> None:
    profiles = [load_profile(name) for name in profile_names()]
    assert all(detect(profile, format).reason for profile in profiles for format in profile.formats)


def test_a_build_without_a_gpu_backend_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    other_machine(monkeypatch, [Accelerator("CPU", "a processor")], gpu=False)
    assert detect(load_profile("cpu"), "gguf") == Availability(True, "a processor")
    for name in ("cuda", "vulkan", "metal"):
        here = detect(load_profile(name), "gguf")
        assert not here.usable
        assert "no GPU backend" in here.reason


def test_a_gpu_of_another_backend_is_not_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Accelerator("CUDA", "a card"), Accelerator("CUDA", "another"), Accelerator("CPU", "a processor")]
    other_machine(monkeypatch, found, gpu=True)
    assert detect(load_profile("cuda"), "gguf") == Availability(True, "a card; another")
    here = detect(load_profile("vulkan"), "gguf")
    assert not here.usable
    assert "no Vulkan device" in here.reason
    assert "CPU, CUDA" in here.reason


@pytest.mark.parametrize("backend", ["MTL", "Metal"])
def test_metal_is_found_under_both_its_names(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    other_machine(monkeypatch, [Accelerator(backend, "an Apple GPU")], gpu=True)
    assert detect(load_profile("metal"), "gguf").usable


def test_a_missing_engine_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise EngineError("llama-cpp-python cannot be loaded", hint="install it")

    monkeypatch.setattr(detection, "library", missing)
    here = detect(load_profile("cpu"), "gguf")
    assert not here.usable
    assert "install it" in here.reason


def test_executorch_can_be_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    here = detect(load_profile("cpu"), "executorch")
    assert here == Availability(True, f"executorch {version('executorch')}, xnnpack")

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(detection.importlib.metadata, "version", missing)
    there = detect(load_profile("cpu"), "executorch")
    assert not there.usable
    assert "skipstone[executorch]" in there.reason


def test_a_device_of_another_system_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    for name, system in (
        ("android-vulkan", "Android"),
        ("apple-coreml", "Darwin"),
        ("android-cpu", "Android"),
    ):
        here = detect(load_profile(name), "executorch")
        assert not here.usable
        assert system in here.reason
        assert here.reason.endswith("this is Linux")
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert detect(load_profile("apple-coreml"), "executorch").usable
    package = detect(load_profile("apple-coreml"), "coreml")
    assert not package.usable
    assert "no engine" in package.reason


def test_looking_for_devices_does_not_import_torch() -> None:
    look = (
        "import sys; from skipstone.devices.detection import detect; "
        "from skipstone.devices.profiles import load_profile; "
        "print(detect(load_profile('cpu'), 'executorch').usable, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_onnx_runtime_can_be_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    here = detect(load_profile("cpu"), "onnx")
    assert here == Availability(True, f"onnxruntime {version('onnxruntime')}, cpu")

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(detection.importlib.metadata, "version", missing)
    there = detect(load_profile("cpu"), "onnx")
    assert not there.usable
    assert "skipstone[onnx]" in there.reason


def test_an_npu_that_is_emulated_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    here = detect(load_profile("qualcomm-sm8650"), "onnx")
    expected = f"onnxruntime-qnn {version('onnxruntime-qnn')}, qnn-sm8650, in the emulator"
    assert here == Availability(True, expected)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert not detect(load_profile("qualcomm-sm8650"), "onnx").reason.endswith("emulator")

    def missing(name: str) -> str:
        if name == "onnxruntime-qnn":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(detection.importlib.metadata, "version", missing)
    there = detect(load_profile("qualcomm-sm8650"), "onnx")
    assert not there.usable
    assert "skipstone[onnx,qualcomm]" in there.reason


@pytest.mark.parametrize(
    ("found", "usable", "words"),
    [
        (["GPU"], True, "webgpu"),
        (["CPU"], True, "in software"),
        ([], False, "finds no GPU"),
        (None, False, "[webgpu]"),
    ],
)
def test_webgpu_needs_its_plugin_and_a_gpu_and_says_when_that_is_software(
    monkeypatch: pytest.MonkeyPatch, found: list[str] | None, usable: bool, words: str
) -> None:
    def devices() -> list[str]:
        if found is None:
            raise EngineError(
                "onnxruntime-ep-webgpu is not installed", hint='`pip install "skipstone[webgpu]"`'
            )
        return found

    monkeypatch.setattr(detection, "webgpu_devices", devices)
    monkeypatch.setattr(detection, "is_gpu", lambda device: device == "GPU")
    here = detect(load_profile("webgpu"), "onnx")
    assert here.usable is usable
    assert here.reason.endswith(words) or words in here.reason
