"""The build helper's decisions on made-up machines, and its cache with a stand-in for pip."""

import dataclasses
import hashlib
import json
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tools import build_llamacpp as build

SAPPHIRE_RAPIDS = (
    "fpu sse sse2 ssse3 fma sse4_1 sse4_2 popcnt avx f16c bmi1 avx2 bmi2 avx512f avx512dq avx512cd avx512bw "
    "avx512vl avx_vnni avx512_bf16 avx512vbmi avx512_vnni amx_bf16 amx_tile amx_int8 md_clear hypervisor"
)
HASWELL = "fpu sse sse2 ssse3 fma sse4_1 sse4_2 popcnt avx f16c bmi1 avx2 bmi2"
GCC_12 = "g++ (Debian 12.2.0-14+deb12u1) 12.2.0"
CLANG_16 = "Debian clang version 16.0.6 (15~deb12u1)"
APPLE = "Apple clang version 16.0.0 (clang-1600.0.26.6)"


def linux(flags: str, arch: str = "x86_64", label: str = "flags") -> build.Machine:
    cpuinfo = f"processor\t: 0\nmodel name\t: made up\n{label}\t\t: {flags}\nbugs\t\t:\n\nprocessor\t: 1\n"
    return build.Machine("Linux", arch, build.cpu_features(cpuinfo), "glibc-2.36")


def compiler(family: str = "clang", major: int = 16, identity: str = CLANG_16) -> build.Compiler:
    return build.Compiler("/usr/bin/cc", "/usr/bin/c++", family, major, identity)


GCC = compiler("gcc", 12, GCC_12)


def put_compiler(folder: Path, names: Sequence[str], version_text: str) -> None:
    """Programs that answer --version as a compiler would."""
    for name in names:
        program = folder / name
        program.write_text(f"#!/bin/sh\necho '{version_text}'\n")
        program.chmod(0o755)


def switched(plan: build.Plan) -> dict[str, str]:
    """ON or OFF of every ggml option the plan names."""
    pairs = (argument.removeprefix("-D").split("=") for argument in plan.cmake_args)
    return {name: value for name, value in pairs if name.startswith("GGML_")}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for stand-in compilers, to be all of PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    return folder


def test_clang_16_is_picked_before_plain_clang_and_gcc(path: Path) -> None:
    put_compiler(path, ["clang", "clang++"], "clang version 14.0.0")
    put_compiler(path, ["gcc", "g++"], f"{GCC_12}\nCopyright (C) 2022 Free Software Foundation, Inc.")
    put_compiler(path, ["clang-16", "clang++-16"], CLANG_16)
    found = build.find_compiler({"PATH": str(path)})
    assert (found.family, found.major, found.identity) == ("clang", 16, CLANG_16)
    assert found.cc == str(path / "clang-16")
    assert found.cxx == str(path / "clang++-16")


def test_gcc_is_picked_where_there_is_no_clang(path: Path) -> None:
    put_compiler(path, ["gcc", "g++"], f"{GCC_12}\nCopyright (C) 2022 Free Software Foundation, Inc.")
    found = build.find_compiler({"PATH": str(path)})
    assert (found.family, found.major, found.cxx) == ("gcc", 12, str(path / "g++"))


def test_a_cxx_compiler_without_its_c_twin_is_passed_over(path: Path) -> None:
    put_compiler(path, ["clang++-16"], CLANG_16)
    put_compiler(path, ["clang-17", "clang++-17"], "clang version 17.0.1")
    assert build.find_compiler({"PATH": str(path)}).major == 17


def test_a_broken_compiler_is_passed_over(path: Path) -> None:
    put_compiler(path, ["clang-16", "clang++-16"], CLANG_16)
    (path / "clang++-16").write_text("#!/bin/sh\nexit 1\n")
    put_compiler(path, ["clang-19", "clang++-19"], "clang version 19.1.0")
    assert build.find_compiler({"PATH": str(path)}).major == 19


def test_gcc_on_a_mac_is_recognised_as_apples_clang(path: Path) -> None:
    put_compiler(path, ["gcc", "g++"], APPLE)
    assert build.find_compiler({"PATH": str(path)}).family == "apple-clang"


def test_cc_and_cxx_name_the_compiler(path: Path) -> None:
    put_compiler(path, ["clang-16", "clang++-16"], CLANG_16)
    put_compiler(path, ["my-cc", "my-c++"], "clang version 18.1.8")
    named = {"PATH": str(path), "CC": str(path / "my-cc"), "CXX": str(path / "my-c++")}
    assert build.find_compiler(named).major == 18


def test_a_named_compiler_that_does_not_run_is_an_error_that_names_it(path: Path) -> None:
    with pytest.raises(build.BuildError, match=r"CXX=/nowhere/c\+\+"):
        build.find_compiler({"PATH": str(path), "CC": "/nowhere/cc", "CXX": "/nowhere/c++"})


def test_no_compiler_at_all_is_an_error_that_says_what_to_install(path: Path) -> None:
    with pytest.raises(build.BuildError, match="apt-get install clang-16"):
        build.find_compiler({"PATH": str(path)})


def test_clang_builds_natively_even_with_amx() -> None:
    plan = build.choose("1.0", linux(SAPPHIRE_RAPIDS), compiler())
    assert plan.cmake_args == ("-DLLAVA_BUILD=OFF",)


@pytest.mark.parametrize(
    "unsafe", [GCC, compiler("gcc", 14, "g++ (GCC) 14.2.1"), compiler("clang", 14, "clang")]
)
def test_gcc_and_old_clang_get_what_the_cpu_has_but_never_amx(unsafe: build.Compiler) -> None:
    options = switched(build.choose("1.0", linux(SAPPHIRE_RAPIDS), unsafe))
    assert options.pop("GGML_NATIVE") == "OFF"
    assert set(options.values()) == {"ON"}
    assert {"GGML_AVX512", "GGML_AVX512_VNNI", "GGML_AVX512_BF16"} <= options.keys()
    assert not [name for name in options if "AMX" in name]


def test_gcc_on_a_cpu_without_avx512_switches_it_off() -> None:
    options = switched(build.choose("1.0", linux(HASWELL), GCC))
    assert {name for name, value in options.items() if value == "ON"} == {
        "GGML_SSE42", "GGML_AVX", "GGML_AVX2", "GGML_BMI2", "GGML_FMA", "GGML_F16C",
    }  # fmt: skip


def test_avx512_needs_all_five_of_its_parts() -> None:
    without_vl = SAPPHIRE_RAPIDS.replace("avx512vl", "")
    assert switched(build.choose("1.0", linux(without_vl), GCC))["GGML_AVX512"] == "OFF"


def test_an_unknown_x86_cpu_switches_everything_off_and_says_so() -> None:
    plan = build.choose("1.0", build.Machine("FreeBSD", "amd64", (), "x"), GCC)
    assert set(switched(plan).values()) == {"OFF"}
    assert "CPU unknown" in plan.reason


def test_arm_and_apple_build_natively() -> None:
    arm = linux("fp asimd asimddp i8mm sve", "aarch64", "Features")
    assert arm.features == ("asimd", "asimddp", "fp", "i8mm", "sve")
    assert switched(build.choose("1.0", arm, GCC)) == {}
    mac = build.Machine("Darwin", "arm64", (), "arm")
    plan = build.choose("1.0", mac, compiler("apple-clang", 16, APPLE))
    assert switched(plan) == {}
    assert "Metal" in plan.reason


def test_the_users_own_cmake_args_come_last_so_that_they_win() -> None:
    plan = build.choose("1.0", linux(HASWELL), GCC, "-DGGML_CUDA=ON -DCMAKE_C_FLAGS='-g -O1'")
    assert plan.cmake_args[-2:] == ("-DGGML_CUDA=ON", "-DCMAKE_C_FLAGS=-g -O1")


def test_a_missing_cpuinfo_gives_a_machine_without_features(tmp_path: Path) -> None:
    machine = build.detect_machine(tmp_path / "cpuinfo")
    assert machine.features == ()
    assert machine.arch


def test_flags_that_shape_no_code_are_left_out_of_the_features() -> None:
    assert linux(HASWELL).features == linux(HASWELL + " md_clear flush_l1d arch_capabilities").features


def test_the_cache_key_changes_with_each_input_and_with_nothing_else() -> None:
    machine = linux(HASWELL)
    plan = build.choose("1.0", machine, compiler())
    keys = [
        build.cache_key(plan, machine, "cpython-311"),
        build.cache_key(dataclasses.replace(plan, version="1.1"), machine, "cpython-311"),
        build.cache_key(
            dataclasses.replace(plan, compiler=compiler(identity="clang version 16.0.7")),
            machine,
            "cpython-311",
        ),
        build.cache_key(dataclasses.replace(plan, cmake_args=("-DX=1",)), machine, "cpython-311"),
        build.cache_key(plan, linux(SAPPHIRE_RAPIDS), "cpython-311"),
        build.cache_key(plan, dataclasses.replace(machine, libc="glibc-2.41"), "cpython-311"),
        build.cache_key(plan, dataclasses.replace(machine, arch="aarch64"), "cpython-311"),
        build.cache_key(plan, machine, "cpython-312"),
    ]
    assert len(set(keys)) == len(keys)
    reworded = dataclasses.replace(plan, reason="said otherwise")
    assert build.cache_key(reworded, machine, "cpython-311") == keys[0]


class StandInPip:
    """Writes a wheel where `pip wheel` would, and counts how often it is asked to."""

    def __init__(self, status: int = 0, text: str = "") -> None:
        self.status, self.text = status, text
        self.environments: list[Mapping[str, str]] = []

    def __call__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
        self.environments.append(environment)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(self.text)
        folder = Path(command[command.index("--wheel-dir") + 1])
        (folder / "llama_cpp_python-1.0-py3-none-any.whl").write_bytes(b"compiled code")
        return self.status


def some_plan() -> build.Plan:
    return build.choose("1.0", linux(HASWELL), GCC)


def test_a_second_build_is_served_from_the_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pip = StandInPip()
    first = build.obtain_wheel(some_plan(), "some-key", tmp_path, pip)
    second = build.obtain_wheel(some_plan(), "some-key", tmp_path, pip)
    assert len(pip.environments) == 1
    assert first == second == tmp_path / "wheels" / "some-key" / "llama_cpp_python-1.0-py3-none-any.whl"
    assert "taken from" in capsys.readouterr().out
    build.obtain_wheel(some_plan(), "another-key", tmp_path, pip)
    assert len(pip.environments) == 2


def test_the_build_is_given_the_chosen_compiler_and_flags(tmp_path: Path) -> None:
    pip, plan = StandInPip(), some_plan()
    wheel = build.obtain_wheel(plan, "some-key", tmp_path, pip)
    environment = pip.environments[0]
    assert (environment["CC"], environment["CXX"]) == ("/usr/bin/cc", "/usr/bin/c++")
    assert environment["CMAKE_ARGS"].split() == list(plan.cmake_args)
    assert json.loads((wheel.parent / "build.json").read_text())["compiler"]["identity"] == GCC_12


def test_a_failed_build_names_its_log_and_leaves_no_wheel(tmp_path: Path) -> None:
    pip = StandInPip(status=1, text="cmake was here\nfatal error: no such header\n")
    with pytest.raises(build.BuildError, match="no such header") as caught:
        build.obtain_wheel(some_plan(), "some-key", tmp_path, pip)
    assert str(tmp_path / "logs" / "llama-cpp-python-some-key.log") in str(caught.value)
    assert list((tmp_path / "wheels").iterdir()) == []


def test_a_folder_left_without_a_wheel_is_built_anew(tmp_path: Path) -> None:
    (tmp_path / "wheels" / "some-key").mkdir(parents=True)
    assert build.obtain_wheel(some_plan(), "some-key", tmp_path, StandInPip()).exists()


def test_a_wheel_that_another_process_finished_first_is_taken(tmp_path: Path) -> None:
    theirs = tmp_path / "wheels" / "some-key" / "llama_cpp_python-1.0-py3-none-any.whl"

    def slower_pip(command: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
        theirs.parent.mkdir(parents=True)
        theirs.write_bytes(b"their compiled code")
        return StandInPip()(command, environment, log)

    assert build.obtain_wheel(some_plan(), "some-key", tmp_path, slower_pip) == theirs
    assert theirs.read_bytes() == b"their compiled code"
    assert [entry.name for entry in (tmp_path / "wheels").iterdir()] == ["some-key"]


def test_a_commands_whole_output_is_logged_and_its_status_returned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "SECONDS_BETWEEN_LINES", 0.0)
    script = "import os, sys; print('[3/7] cc'); print(os.environ['CC'], file=sys.stderr); sys.exit(5)"
    log = tmp_path / "logs" / "build.log"
    assert build.run_logged([sys.executable, "-c", script], {"CC": "some-cc"}, log) == 5
    assert sorted(log.read_text().split("\n")) == ["", "[3/7] cc", "some-cc"]
    assert "step 3 of 7" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("  [12/230] Building CXX object ggml.cpp.o\n", "step 12 of 230"),
        ("[ 12%] Building CXX object ggml.cpp.o\n", "12 %"),
        ("-- Found Threads: TRUE\n", None),
        ("warning: [-Wunused]\n", None),
    ],
)
def test_progress_is_read_from_ninjas_and_makes_lines(line: str, said: str | None) -> None:
    assert build.progress(line) == said


def test_only_the_very_wheel_that_is_installed_counts_as_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "package.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("module.py", "")
    site = tmp_path / "site"
    information = site / "llama_cpp_python-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 1.0\n")
    monkeypatch.setattr(sys, "path", [str(site)])
    assert not build.is_installed(wheel)
    noted = {"archive_info": {"hashes": {"sha256": hashlib.sha256(wheel.read_bytes()).hexdigest()}}}
    (information / "direct_url.json").write_text(json.dumps(noted))
    assert build.is_installed(wheel)
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    assert not build.is_installed(wheel)


def test_the_version_comes_from_the_constraints_file(tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("# pins\nllama-cpp-python-extra==9\nllama-cpp-python==0.3.36\n")
    assert build.pinned_version(constraints) == "0.3.36"
    constraints.write_text("numpy==2.0\n")
    with pytest.raises(build.BuildError, match=r"constraints\.txt has no line `llama-cpp-python==VERSION`"):
        build.pinned_version(constraints)


def test_a_cache_that_cannot_be_written_is_one_line_and_exit_status_1(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_compiler(path, ["clang-16", "clang++-16"], CLANG_16)
    monkeypatch.setenv("PATH", str(path))
    (tmp_path / "file").touch()
    monkeypatch.setenv("SKIPSTONE_CACHE", str(tmp_path / "file"))
    assert build.main([]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "SKIPSTONE_CACHE" in error
    assert error.count("\n") == 1


def test_a_dry_run_says_what_and_where_and_builds_nothing(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_compiler(path, ["gcc", "g++"], f"{GCC_12}\nCopyright (C) 2022 Free Software Foundation, Inc.")
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.setenv("SKIPSTONE_CACHE", str(tmp_path / "cache"))
    assert build.main(["--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"{path / 'g++'} (gcc 12)" in said
    assert str(tmp_path / "cache" / "wheels") in said
    assert not (tmp_path / "cache").exists()
