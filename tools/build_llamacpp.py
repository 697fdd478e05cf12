"""Builds llama-cpp-python for this machine once, keeps the wheel, and installs it.

    python tools/build_llamacpp.py            build (or take from the cache) and install into this Python
    python tools/build_llamacpp.py --dry-run  only say what would be built and where it would be kept

llama-cpp-python comes as source and takes minutes to compile, and the compiler decides how it behaves:
clang's native build is the fastest, and what gcc makes of the AMX tile code crashes on quantised batches.
So the compiler is chosen here, gcc gets explicit flags without AMX, and the wheel is kept under a key made
of everything that shaped it. Standard library only: it runs before anything is installed.

Environment: CC and CXX (both) name the compiler, CMAKE_ARGS is appended to our flags (say -DGGML_CUDA=ON),
SKIPSTONE_CACHE replaces ~/.cache/skipstone.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

PACKAGE = "llama-cpp-python"
CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
COMPILERS = (
    *((f"clang-{n}", f"clang++-{n}") for n in (16, 17, 18, 19)),
    ("clang", "clang++"),
    ("gcc", "g++"),
)
OLDEST_NATIVE_CLANG = 16  # the oldest whose AMX code was seen to run
SECONDS_BETWEEN_LINES = 10.0

# ggml option → the /proc/cpuinfo flags that must all be there. AMX is left out on purpose.
X86_OPTIONS = {
    "GGML_SSE42": {"sse4_2"},
    "GGML_AVX": {"avx"},
    "GGML_AVX2": {"avx2"},
    "GGML_BMI2": {"bmi2"},
    "GGML_FMA": {"fma"},
    "GGML_F16C": {"f16c"},
    "GGML_AVX512": {"avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"},
    "GGML_AVX512_VBMI": {"avx512f", "avx512vbmi"},
    "GGML_AVX512_VNNI": {"avx512f", "avx512_vnni"},
    "GGML_AVX512_BF16": {"avx512f", "avx512_bf16"},
}
INSTRUCTION_SETS = re.compile(r"(sse|ssse|avx|amx|fma|f16c|bmi|popcnt|abm|gfni|vaes|movbe)")


class BuildError(Exception):
    """Nothing could be built or installed; the message says why and what to do."""


@dataclass(frozen=True)
class Machine:
    """What compiled code depends on: `system` and `arch` as `platform` names them, CPU `features`, `libc`."""

    system: str
    arch: str
    features: tuple[str, ...]
    libc: str


@dataclass(frozen=True)
class Compiler:
    """A C and C++ compiler; `family` is clang, apple-clang or gcc, `identity` its own version line."""

    cc: str
    cxx: str
    family: str
    major: int
    identity: str


@dataclass(frozen=True)
class Plan:
    """What will be built, with which flags, and why."""

    version: str
    compiler: Compiler
    cmake_args: tuple[str, ...]
    reason: str


Runner = Callable[[Sequence[str], Mapping[str, str], Path], int]
"""Runs a command with these additions to the environment, its output to the log; returns the exit status."""


def cpu_features(cpuinfo: str) -> tuple[str, ...]:
    """The instruction sets named in the text of /proc/cpuinfo, sorted; empty where it names none.

    Flags without bearing on generated code are left out, so that a kernel update does not cost a rebuild.
    """
    line = re.search(r"^(flags|Features)\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    if line is None:
        return ()
    found = set(line[2].split())
    return tuple(sorted(f for f in found if line[1] == "Features" or INSTRUCTION_SETS.match(f)))


def detect_machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> Machine:
    """This machine; systems without a readable `cpuinfo` are told apart by the processor's name alone."""
    try:
        features = cpu_features(cpuinfo.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        features = ()
    libc = "-".join(platform.libc_ver()) if platform.system() == "Linux" else platform.processor()
    return Machine(platform.system(), platform.machine(), features, libc)


def identify(cc: str, cxx: str) -> Compiler | None:
    """Asks `cxx` who it is; None if it does not run or is neither clang nor gcc."""
    try:
        asked = subprocess.run([cxx, "--version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    identity = asked.stdout.partition("\n")[0].strip()
    if asked.returncode != 0:
        return None
    if clang := re.search(r"(Apple )?clang version (\d+)", identity):
        return Compiler(cc, cxx, "apple-clang" if clang[1] else "clang", int(clang[2]), identity)
    # The distribution's own version stands in brackets before gcc's.
    if "Free Software Foundation" in asked.stdout and (gcc := re.search(r"\)\s+(\d+)\.", identity)):
        return Compiler(cc, cxx, "gcc", int(gcc[1]), identity)
    return None


def find_compiler(environ: Mapping[str, str], candidates: Iterable[tuple[str, str]] = COMPILERS) -> Compiler:
    """The compiler named by CC and CXX, or the first candidate on PATH that answers.

    Raises:
        BuildError: none was found, or the named one does not answer.
    """
    cc, cxx = environ.get("CC"), environ.get("CXX")
    if cc and cxx:
        if named := identify(cc, cxx):
            return named
        raise BuildError(f"CXX={cxx} is no clang or gcc that runs; unset CC and CXX to have one picked")
    for cc, cxx in candidates:
        paths = [shutil.which(name, path=environ.get("PATH")) for name in (cc, cxx)]
        if paths[0] and paths[1] and (found := identify(paths[0], paths[1])):
            return found
    raise BuildError(
        "no C++ compiler found (looked for clang++ and g++): install one, "
        "say `apt-get install clang-16`, `dnf install clang` or `xcode-select --install`"
    )


def choose(version: str, machine: Machine, compiler: Compiler, extra: str = "") -> Plan:
    """The flags for this machine and compiler; `extra` is the user's own CMAKE_ARGS, which win."""
    flags, reason = _flags(machine, compiler)
    return Plan(version, compiler, (*flags, "-DLLAVA_BUILD=OFF", *shlex.split(extra)), reason)


def _flags(machine: Machine, compiler: Compiler) -> tuple[tuple[str, ...], str]:
    if compiler.family == "apple-clang":
        return (), "native build, Metal as llama.cpp sets it"
    if machine.arch.lower() not in {"x86_64", "amd64"}:
        return (), f"native build for {machine.arch}"
    if compiler.family == "clang" and compiler.major >= OLDEST_NATIVE_CLANG:
        return (), "native build, the fastest"
    present = set(machine.features)
    # Each option is given either way: with GGML_NATIVE off, ggml takes AVX2 for granted.
    flags = tuple(f"-D{name}={'ON' if need <= present else 'OFF'}" for name, need in X86_OPTIONS.items())
    reason = "explicit flags without AMX, whose code from this compiler crashes; clang 16 or later is faster"
    return ("-DGGML_NATIVE=OFF", *flags), reason if present else f"{reason}; CPU unknown, so plain x86-64"


def cache_key(plan: Plan, machine: Machine, python_tag: str) -> str:
    """Names the cache folder: changes with everything that shapes the compiled code."""
    inputs = [plan.version, plan.compiler.identity, plan.cmake_args, asdict(machine), python_tag]
    digest = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]
    return f"{plan.version}-{plan.compiler.family}{plan.compiler.major}-{digest}"


def cache_root(environ: Mapping[str, str]) -> Path:
    """Where everything that can be rebuilt is kept, outside any clone."""
    named = environ.get("SKIPSTONE_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "skipstone"


def cached_wheel(folder: Path) -> Path | None:
    """The wheel in a cache folder, if there is one."""
    return next(iter(sorted(folder.glob("*.whl"))), None)


def obtain_wheel(plan: Plan, key: str, root: Path, run: Runner) -> Path:
    """The wheel for `plan` from the cache under `root`, built first if it is not there.

    The build runs in a temporary folder beside its final place and is renamed when whole: a broken-off build
    leaves nothing that looks like a wheel.

    Raises:
        BuildError: the build failed; the message names its log.
        OSError: the cache cannot be written.
    """
    folder = root / "wheels" / key
    if wheel := cached_wheel(folder):
        _say(f"{PACKAGE} {plan.version} taken from {folder}")
        return wheel
    log = root / "logs" / f"{PACKAGE}-{key}.log"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as work:
        fresh = Path(work) / key
        fresh.mkdir()
        _compile(plan, fresh, log, run)
        (fresh / "build.json").write_text(json.dumps(asdict(plan), indent=2) + "\n", encoding="utf-8")
        _move_into_place(fresh, folder)
    if wheel := cached_wheel(folder):
        return wheel
    raise BuildError(f"{folder} holds no wheel after the build; remove it and run this again (log: {log})")


def _compile(plan: Plan, into: Path, log: Path, run: Runner) -> None:
    _say(f"compiling {PACKAGE} {plan.version}: minutes, and only this once; log: {log}")
    # pip keeps wheels it built by source alone, whatever the compiler was: never take one of those.
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-cache-dir"]
    command += ["--no-binary", PACKAGE, "--wheel-dir", str(into), f"{PACKAGE}=={plan.version}"]
    environment = {
        "CC": plan.compiler.cc,
        "CXX": plan.compiler.cxx,
        "CMAKE_ARGS": shlex.join(plan.cmake_args),
    }
    started = time.monotonic()
    status = run(command, environment, log)
    if status != 0:
        last = (
            log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-5:]
            if log.exists()
            else []
        )
        raise BuildError(
            "\n    ".join([f"the build failed (status {status}); its whole output: {log}", *last])
        )
    _say(f"compiled in {time.monotonic() - started:.0f} s")


def _move_into_place(fresh: Path, folder: Path) -> None:
    """Renames `fresh` to `folder`; a wheel that another process put there meanwhile is as good."""
    if folder.exists() and cached_wheel(folder) is None:
        shutil.rmtree(folder)
    try:
        fresh.rename(folder)
    except OSError:
        if cached_wheel(folder) is None:
            raise


def run_logged(command: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
    """Runs `command`, writes all of its output to `log`, and prints how far the compiler is now and then."""
    log.parent.mkdir(parents=True, exist_ok=True)
    started = said = time.monotonic()
    with (
        log.open("w", encoding="utf-8") as out,
        subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        for line in process.stdout or ():
            out.write(line)
            now = time.monotonic()
            if (step := progress(line)) and now - said >= SECONDS_BETWEEN_LINES:
                _say(f"compiling, {step}, {now - started:.0f} s")
                said = now
    return process.returncode


def progress(line: str) -> str | None:
    """How far a line of ninja's ("[3/200] …") or make's ("[ 12%] …") output says the build is."""
    if ninja := re.match(r"\s*\[(\d+)/(\d+)\]", line):
        return f"step {ninja[1]} of {ninja[2]}"
    if make := re.match(r"\s*\[\s*(\d+)%\]", line):
        return f"{make[1]} %"
    return None


def install(wheel: Path, constraints: Path, run: Runner, log: Path) -> None:
    """Installs `wheel` into this Python, what it needs held to `constraints`; quick if it is there already.

    Raises:
        BuildError: pip failed, or the installed package cannot be imported.
    """
    pip = [sys.executable, "-m", "pip", "install"]
    if not is_installed(wheel):
        _run_pip([*pip, "--force-reinstall", "--no-deps", str(wheel)], run, log)
    _run_pip([*pip, "-c", str(constraints), str(wheel)], run, log)
    check_import(wheel.parent)


def _run_pip(command: Sequence[str], run: Runner, log: Path) -> None:
    if run(command, {}, log) != 0:
        raise BuildError(f"pip could not install {command[-1]}; its output: {log}")


def is_installed(wheel: Path) -> bool:
    """Whether the installed package came from this very file (pip notes the hash of what it installs)."""
    try:
        noted = importlib.metadata.distribution(PACKAGE).read_text("direct_url.json")
        hashes = json.loads(noted or "{}").get("archive_info", {}).get("hashes", {})
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return False
    with wheel.open("rb") as file:
        return bool(hashes.get("sha256") == hashlib.file_digest(file, "sha256").hexdigest())


def check_import(folder: Path) -> None:
    """Imports llama_cpp in a process of its own: code for another CPU would take this one down."""
    command = [sys.executable, "-c", "import llama_cpp; print(llama_cpp.__version__)"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    if asked.returncode == 0:
        _say(f"{PACKAGE} {asked.stdout.strip()} installed and importable")
        return
    why = (asked.stderr.strip().splitlines() or ["no output"])[-1]
    if asked.returncode < 0:
        why = f"killed by {signal.Signals(-asked.returncode).name}"
    raise BuildError(
        f"llama_cpp is installed but cannot be imported: {why}; remove {folder} and run this again"
    )


def pinned_version(constraints: Path, package: str = PACKAGE) -> str:
    """The exact version that the constraints file names for `package`.

    Raises:
        BuildError: the file cannot be read or has no such line.
    """
    try:
        lines = constraints.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise BuildError(f"cannot read {constraints}: {error.strerror}") from error
    for line in lines:
        name, _, version = line.partition("==")
        if name.strip() == package and version:
            return version.strip()
    raise BuildError(f"{constraints} has no line `{package}==VERSION`")


def _say(text: str) -> None:
    print(f"[llama.cpp] {text}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Build llama-cpp-python for this machine, keep it, install it."
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be built")
    parser.add_argument("--constraints", type=Path, default=CONSTRAINTS, help="file with the pinned versions")
    options = parser.parse_args(arguments)
    root = cache_root(os.environ)
    try:
        build_and_install(root, options.constraints, dry_run=options.dry_run)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}; is {root} writable? SKIPSTONE_CACHE names another cache", file=sys.stderr)
        return 1
    return 0


def build_and_install(root: Path, constraints: Path, *, dry_run: bool) -> None:
    """The whole job with this machine's compiler: choose, say so, obtain the wheel, install it."""
    machine = detect_machine()
    compiler = find_compiler(os.environ)
    plan = choose(pinned_version(constraints), machine, compiler, os.environ.get("CMAKE_ARGS", ""))
    _say(f"{compiler.cxx} ({compiler.family} {compiler.major}): {plan.reason}")
    _say(f"CMAKE_ARGS={shlex.join(plan.cmake_args)}")
    key = cache_key(plan, machine, f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}")
    if dry_run:
        _say(f"would be kept in {root / 'wheels' / key}")
        return
    wheel = obtain_wheel(plan, key, root, run_logged)
    install(wheel, constraints, run_logged, root / "logs" / "install.log")


if __name__ == "__main__":
    sys.exit(main())
