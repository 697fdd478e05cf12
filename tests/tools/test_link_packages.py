"""The tree of links that type checkers read."""

from pathlib import Path

from tools.link_packages import link_packages, package_folders


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def seen(into: Path) -> set[str]:
    """The files that a program which follows links finds in the package and its subpackage."""
    folders = (into / "pkg", into / "pkg" / "inner")
    return {
        entry.relative_to(into).as_posix()
        for folder in folders
        for entry in folder.iterdir()
        if entry.is_file()
    }


def test_folders_are_laid_out_as_the_package_they_install_as(tmp_path: Path) -> None:
    write(tmp_path / "outside" / "a.py", "A = 1\n")
    write(tmp_path / "elsewhere" / "b.py")
    folders = {"pkg": tmp_path / "outside", "pkg.inner": tmp_path / "elsewhere"}
    link_packages(folders, tmp_path / "typed")
    assert seen(tmp_path / "typed") == {"pkg/a.py", "pkg/inner/b.py"}
    assert (tmp_path / "typed" / "pkg" / "a.py").read_text() == "A = 1\n"


def test_a_second_run_picks_up_new_moved_and_removed_files(tmp_path: Path) -> None:
    old = write(tmp_path / "outside" / "a.py")
    write(tmp_path / "elsewhere" / "b.py")
    folders = {"pkg": tmp_path / "outside", "pkg.inner": tmp_path / "elsewhere"}
    link_packages(folders, tmp_path / "typed")
    old.unlink()
    write(tmp_path / "outside" / "new.py")
    write(tmp_path / "third" / "b.py", "moved\n")
    link_packages({**folders, "pkg.inner": tmp_path / "third"}, tmp_path / "typed")
    assert seen(tmp_path / "typed") == {"pkg/new.py", "pkg/inner/b.py"}
    assert (tmp_path / "typed" / "pkg" / "inner" / "b.py").read_text() == "moved\n"


def test_pycache_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / "outside" / "__pycache__" / "a.pyc")
    write(tmp_path / "outside" / "a.py")
    link_packages({"pkg": tmp_path / "outside"}, tmp_path / "typed")
    assert [entry.name for entry in (tmp_path / "typed" / "pkg").iterdir()] == ["a.py"]


def test_the_mapping_is_read_from_the_project_file(tmp_path: Path) -> None:
    write(tmp_path / "pyproject.toml", '[tool.setuptools.package-dir]\n"pkg" = "src"\n"pkg.inner" = "more"\n')
    assert package_folders(tmp_path) == {"pkg": tmp_path / "src", "pkg.inner": tmp_path / "more"}
