"""The package as it is installed: complete, layered, light to import, with pinned dependencies."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import skipstone

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "skipstone": "sdk",
    "skipstone.exporters": "exporters",
    "skipstone.runtimes": "runtimes",
    "skipstone.devices": "devices",
}
# Within one of the folders, installed elsewhere: what puts our command into `optimum-cli`.
REGISTER = {"optimum.commands.register": "sdk/optimum_register"}
EVERYBODYS = ("skipstone.bundle", "skipstone.errors")
MAY_IMPORT = {
    "exporters": (*EVERYBODYS, "skipstone.exporters", "skipstone.devices", "skipstone.runtimes"),
    "runtimes": (*EVERYBODYS, "skipstone.runtimes"),
    "devices": (*EVERYBODYS, "skipstone.devices", "skipstone.runtimes"),
}
HEAVY = {"accelerate", "datasets", "matplotlib", "optimum", "torch", "transformers"}


def shipped_files() -> dict[str, Path]:
    """Every file of the four folders by its place in the installed package."""
    places = {
        path: f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}"
        for package, folder in (FOLDERS | REGISTER).items()  # the inner folder comes last and wins
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    return {place: path for path, place in places.items()}


def modules() -> dict[str, Path]:
    """Every module of ours by its import name."""
    return {
        re.sub(r"/__init__$", "", place.removesuffix(".py")).replace("/", "."): path
        for place, path in shipped_files().items()
        if place.endswith(".py")
    }


def imports(path: Path, name: str, *, at_import_time: bool = False) -> Iterator[str]:
    """Dotted names that a module imports, `from a import b` as a.b; `at_import_time` leaves lazy ones out."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if at_import_time and (lazy or typing_only):
            continue
        waiting.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            yield from (f"{source}.{alias.name}" for alias in node.names)


def lies_in(name: str, packages: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """What a wheel of a copy of the sources holds (a copy, for setuptools reuses an old build folder)."""
    copy = tmp_path_factory.mktemp("sources")
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    script = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    built = subprocess.run(
        [sys.executable, "-c", script], cwd=copy, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = (copy / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_file_of_the_four_folders(wheel_names: set[str]) -> None:
    installed = {name for name in wheel_names if ".dist-info/" not in name}
    assert installed == set(shipped_files())


def test_the_wheel_adds_one_module_to_optimums_namespace_and_no_package_file(wheel_names: set[str]) -> None:
    added = {name for name in wheel_names if name.startswith("optimum/")}
    assert added == {"optimum/commands/register/register_skipstone.py"}


def test_the_wheel_says_that_it_is_typed_and_brings_the_command_and_the_licence(
    wheel_names: set[str],
) -> None:
    assert "skipstone/py.typed" in wheel_names
    assert {name.partition("/")[2] for name in wheel_names if ".dist-info/" in name} >= {
        "entry_points.txt",
        "licenses/LICENSE",
    }


def test_the_folders_here_are_those_of_the_project_file() -> None:
    assert project_file()["tool"]["setuptools"]["package-dir"] == FOLDERS | REGISTER


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_imports_between_the_folders_point_one_way(folder: str) -> None:
    wrong = [
        f"{name} imports {target}"
        for name, path in modules().items()
        if lies_in(name, (f"skipstone.{folder}",))
        for target in imports(path, name)
        if lies_in(target, ("skipstone",)) and not lies_in(target, MAY_IMPORT[folder])
    ]
    assert wrong == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    known = modules()
    graph = {
        name: {
            found
            for target in imports(path, name, at_import_time=True)
            if (found := target if target in known else target.rpartition(".")[0]) in known and found != name
        }
        for name, path in known.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as cycle:
        pytest.fail(" → ".join(cycle.args[1]))


def test_only_the_exporters_and_the_eager_engine_import_torch_when_imported() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, path in modules().items()
        if not lies_in(name, ("skipstone.exporters",)) and "eager" not in name
        for target in imports(path, name, at_import_time=True)
        if target.partition(".")[0] in HEAVY
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "module", ["skipstone", "skipstone.bundle", "skipstone.cli", "skipstone.devices", "skipstone.runtimes"]
)
def test_importing_leaves_torch_and_its_kin_out(module: str) -> None:
    script = f"import sys, {module}; print(*sys.modules)"
    asked = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert asked.returncode == 0, asked.stderr
    loaded = set(asked.stdout.split())
    assert module in loaded
    assert loaded & HEAVY == set()


def project_file() -> dict[str, dict]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirements(*, without: str | None = None) -> list[Requirement]:
    """What the project file declares: the core and all extras, or all but one."""
    project = project_file()["project"]
    extras = project["optional-dependencies"]
    lines = [
        *project["dependencies"],
        *(line for extra in extras if extra != without for line in extras[extra]),
    ]
    return [Requirement(line) for line in lines]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def test_every_declared_dependency_is_pinned_to_a_version_that_fits() -> None:
    pinned = pins()
    for requirement in requirements():
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), str(requirement)


def test_every_third_party_import_is_declared_outside_the_dev_extra() -> None:
    declared = {canonicalize_name(requirement.name) for requirement in requirements(without="dev")}
    providers = packages_distributions()
    undeclared = {
        f"{name} imports {target}"
        for name, path in modules().items()
        for target in imports(path, name)
        if (top := target.partition(".")[0]) not in {*sys.stdlib_module_names, "skipstone"}
        and declared.isdisjoint(canonicalize_name(provider) for provider in providers.get(top, [top]))
    }
    assert undeclared == set()


def test_the_core_needs_nothing_from_an_extra() -> None:
    core = {canonicalize_name(Requirement(line).name) for line in project_file()["project"]["dependencies"]}
    assert (
        core & {canonicalize_name(name) for name in (*HEAVY, "llama-cpp-python", "executorch", "onnx")}
        == set()
    )


def test_the_package_knows_the_version_it_is_released_as() -> None:
    assert skipstone.__version__ == project_file()["project"]["version"]
