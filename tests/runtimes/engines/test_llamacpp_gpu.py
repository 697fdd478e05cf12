"""Layers on GPUs: what every file is told, and what is refused before anything is loaded. No GPU is needed: the registry
is replaced, and a build for CPUs loads what it is told to place on a GPU where it can.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from skipstone.bundle import Bundle, GgufManifest, manifest_of
from skipstone.errors import EngineError, UsageError
from skipstone.runtimes.engines import EngineOptions, open_engine
from skipstone.runtimes.engines.base import Share
from skipstone.runtimes.engines.llamacpp import LlamaCppEngine, memory
from skipstone.runtimes.engines.llamacpp.embedding import table_bytes
from skipstone.runtimes.engines.llamacpp.load_plan import PlannedPart, load_plan, spread
from skipstone.runtimes.engines.llamacpp.registry import RegisteredDevice, registered_devices
from skipstone.runtimes.session import Session

PROMPT = [68, 69, 70, 32, 71]
CPU = RegisteredDevice("CPU", "a processor", False, 64_000_000_000, 64_000_000_000)
LARGE = RegisteredDevice("CUDA", "a card", True, 24_000_000_000, 24_000_000_000)


class Build:
    """A llama.cpp whose registry lists these devices."""

    def __init__(self, *devices: RegisteredDevice) -> None:
        self.llama, self.devices = self, devices

    def llama_supports_gpu_offload(self) -> bool:
        return any(device.is_gpu for device in self.devices)


def build(monkeypatch: pytest.MonkeyPatch, *devices: RegisteredDevice) -> None:
    monkeypatch.setattr(memory, "library", lambda: Build(*devices))
    monkeypatch.setattr(memory, "registered_devices", lambda: list(devices))


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    build(monkeypatch, CPU, LARGE)


@pytest.mark.parametrize(
    ("gpu_layers", "numbers"),
    [
        (0, (0, 0, 0)),
        (1, (0, 0, 1)),  # the LM head alone
        (2, (0, 0, 2)),  # and the last layer
        (7, (0, 0, 7)),
        (8, (0, 2, 7)),
        (11, (0, 5, 7)),
        (12, (2, 5, 7)),
        (13, (3, 5, 7)),
        (99, (3, 5, 7)),
        (-1, (3, 5, 7)),
    ],
)
def test_layers_go_to_the_gpu_from_the_last_one_on_and_the_head_before_them(
    gpu_layers: int, numbers: tuple[int, ...]
) -> None:
    assert spread((2, 4, 6), gpu_layers) == numbers
    on_gpu = sum(max(0, number - 1) for number in numbers)
    wanted = 12 if gpu_layers in (-1, 99) else max(0, gpu_layers - 1)
    assert on_gpu == wanted, "as llama.cpp counts them in an uncut model"


def test_bytes_on_the_gpu_and_on_the_host_are_all_of_a_part() -> None:
    part = PlannedPart("", 4, 3, layer_bytes=400, tail_bytes=50, lookup_bytes=7)  # type: ignore[arg-type]
    assert (part.gpu_bytes, part.host_bytes) == (250, 207)
    assert PlannedPart("", 4, 0, 400, 50, 7).host_bytes == 457  # type: ignore[arg-type]
    assert PlannedPart("", 4, 5, 400, 50, 7).host_bytes == 7  # type: ignore[arg-type]


@pytest.mark.engine
def test_a_bundles_files_are_planned_with_their_sizes(tiny_bundle: Bundle) -> None:
    manifest = manifest_of(tiny_bundle, GgufManifest)
    plan = load_plan(tiny_bundle, EngineOptions(gpu_layers=3))
    assert [part.gpu_layers for part in plan.segments.values()] == [0, 0, 3]
    assert plan.draft_head is not None
    assert plan.draft_head.gpu_layers == 0, "it stays with the first segment"
    sizes = {entry.path: entry.size for entry in manifest.files}
    names = [segment.file for segment in manifest.segments]
    assert [part.host_bytes + part.gpu_bytes for part in plan.segments.values()] == [sizes[n] for n in names]
    table = table_bytes(manifest.embedding)
    last = plan.segments[2]
    assert not manifest.model.tied_embeddings
    assert (last.tail_bytes, last.lookup_bytes) == (table, table), "the head, and the table to look up"
    whole = load_plan(tiny_bundle, EngineOptions(gpu_layers=-1))
    assert whole.draft_head is not None
    assert whole.draft_head.host_bytes == 0
    assert sum(part.host_bytes for part in whole) == table


@pytest.mark.engine
def test_a_share_is_planned_alone_and_counts_layers_of_the_whole_model(tiny_bundle: Bundle) -> None:
    share = Share(frozenset({1}), draft_head=False)
    plan = load_plan(tiny_bundle, EngineOptions(gpu_layers=4, share=share))
    assert {index: part.gpu_layers for index, part in plan.segments.items()} == {1: 2}
    assert plan.draft_head is None


@pytest.mark.engine
@pytest.mark.usefixtures("with_gpu")
def test_every_file_is_loaded_with_its_own_number_of_layers(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build in use may have no GPU: llama.cpp then keeps them on the CPU, and gives the same logits."""
    with open_session(tiny_bundle, 0) as session:
        expected = session.prefill(PROMPT)
        assert isinstance(session.engine, LlamaCppEngine)
        assert [part.gpu_layers for part in session.engine._parts.values()] == [0, 0, 0]
    with open_session(tiny_bundle, 4) as session:
        assert isinstance(session.engine, LlamaCppEngine)
        assert [part.gpu_layers for part in session.engine._parts.values()] == [0, 2, 3]
        assert abs(session.prefill(PROMPT) - expected).max() < 1e-3


def open_session(bundle: Bundle, gpu_layers: int) -> Session:
    return Session(open_engine(bundle, EngineOptions(threads=1, gpu_layers=gpu_layers)), 64)


@pytest.mark.engine
def test_a_gpu_that_is_too_small_is_refused_with_both_sizes(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = manifest_of(tiny_bundle, GgufManifest)
    weights = sum(path.stat().st_size for path in tiny_bundle.path.glob("*.gguf"))
    needed = f"{(weights - table_bytes(manifest.embedding)) / 1e6:.1f} MB"
    build(monkeypatch, CPU, RegisteredDevice("CUDA", "a small card", True, 100_000, 8_000_000_000))
    with pytest.raises(EngineError) as refused:
        open_engine(tiny_bundle, EngineOptions(threads=1, gpu_layers=-1))
    message = str(refused.value)
    assert str(tiny_bundle.path) in message
    assert f"--gpu-layers -1 needs {needed} on the GPU, a small card has 0.1 MB free" in message
    open_engine(tiny_bundle, EngineOptions(threads=1)).close()


@pytest.mark.engine
def test_layers_are_spread_over_all_gpus(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    halves = [RegisteredDevice("CUDA", name, True, 400_000, 8_000_000) for name in ("one", "another")]
    build(monkeypatch, CPU, *halves)
    open_engine(tiny_bundle, EngineOptions(threads=1, gpu_layers=-1)).close()
    build(monkeypatch, CPU, halves[0])
    with pytest.raises(EngineError, match=r"one has 0\.4 MB free"):
        open_engine(tiny_bundle, EngineOptions(threads=1, gpu_layers=-1))


@pytest.mark.engine
def test_a_gpu_that_does_not_tell_its_memory_is_tried(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(monkeypatch, CPU, RegisteredDevice("Vulkan", "a silent card", True, 0, 0))
    open_engine(tiny_bundle, EngineOptions(threads=1, gpu_layers=-1)).close()


@pytest.mark.engine
def test_a_build_without_a_gpu_is_refused_with_what_it_has(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(monkeypatch, CPU)
    with pytest.raises(EngineError, match=r"no GPU backend or finds no GPU \(its devices: CPU\)"):
        open_engine(tiny_bundle, EngineOptions(threads=1, gpu_layers=1))


@pytest.mark.engine
def test_fewer_layers_than_none_are_refused(tiny_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="--gpu-layers -2"):
        open_engine(tiny_bundle, EngineOptions(threads=1, gpu_layers=-2))


@pytest.mark.engine
def test_weights_larger_than_available_memory_are_refused_before_they_are_loaded(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 300_000)
    weights = sum(path.stat().st_size for path in tiny_bundle.path.glob("*.gguf"))
    said = f"weights need {weights / 1e6:.1f} MB, this machine has 0.3 MB of memory available"
    with pytest.raises(EngineError, match=re.escape(said)):
        open_engine(tiny_bundle, EngineOptions(threads=1))
    share = Share(frozenset({0}), draft_head=False)
    open_engine(tiny_bundle, EngineOptions(threads=1, share=share)).close()  # a part of it fits


@pytest.mark.engine
def test_where_the_system_does_not_tell_the_whole_memory_is_the_bound(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    open_engine(tiny_bundle, EngineOptions(threads=1)).close()
    build(monkeypatch, RegisteredDevice("CPU", "a tiny processor", False, 0, 300_000))
    with pytest.raises(EngineError, match="this machine has"):
        open_engine(tiny_bundle, EngineOptions(threads=1))


@pytest.mark.engine
@pytest.mark.parametrize(("kv_type", "value_bytes"), [("f32", 4), ("f16", 2)])
def test_k_and_v_that_do_not_fit_are_refused_before_they_are_made(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, kv_type: str, value_bytes: int
) -> None:
    """4 layers, 2 heads of 16 for K and for V, 256 positions."""
    bytes_needed = 4 * 2 * 16 * 2 * 256 * value_bytes
    engine = open_engine(tiny_bundle, EngineOptions(threads=1, kv_type=kv_type))
    monkeypatch.setattr(memory, "available_bytes", lambda: bytes_needed)
    Session(engine, 256).close()
    monkeypatch.setattr(memory, "available_bytes", lambda: bytes_needed - 1)
    with pytest.raises(EngineError, match=r"K and V of 256 positions need .* of memory are available"):
        Session(engine, 256)
    Session(engine, 128).close()
    engine.close()


@pytest.mark.engine
def test_k_and_v_of_layers_on_a_gpu_are_kept_there(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(monkeypatch, CPU, LARGE)
    engine = open_engine(tiny_bundle, EngineOptions(threads=1, gpu_layers=-1))
    build(monkeypatch, CPU, RegisteredDevice("CUDA", "a full card", True, 1000, 8_000_000))
    with pytest.raises(EngineError, match="on the GPU are available"):
        Session(engine, 256)
    engine.close()


@pytest.fixture
def qwen(tiny_qwen_bundle: Bundle) -> Iterator[LlamaCppEngine]:
    engine = open_engine(tiny_qwen_bundle, EngineOptions(threads=1))
    assert isinstance(engine, LlamaCppEngine)
    yield engine
    engine.close()


@pytest.mark.engine
def test_values_per_position_come_from_the_file(qwen: LlamaCppEngine) -> None:
    """Heads of 16 that are not hidden size / heads would be counted wrongly otherwise."""
    assert [part.values_per_position for part in qwen._parts.values()] == [64, 64, 128]


@pytest.mark.engine
def test_the_registry_tells_of_this_machines_processor() -> None:
    (cpu,) = [device for device in registered_devices() if device.backend == "CPU"]
    assert not cpu.is_gpu
    assert cpu.total_bytes > 100_000_000
