"""`bench --curve-only`, `--curve FILE`, and what `inspect` shows of kept curves."""

import json
import shutil
from pathlib import Path

import pytest

from skipstone.devices.curves import MeasuredCurve, read_curve
from skipstone.errors import UsageError
from skipstone.model import Model, load_model
from tests.sdk.cli.command import assert_refused, skipstone
from tests.sdk.scripted import CHEAP_DRAFTS, ScriptedEngine, byte_tokenizer, write_bundle

PROMPT = "go "


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Budgets of all measurements; the bundle is the scripted one."""
    budgets: list[float] = []

    def measure(_engine: object, budget_seconds: float) -> object:
        budgets.append(budget_seconds)
        return CHEAP_DRAFTS

    engine = ScriptedEngine([*byte_tokenizer().encode(PROMPT).ids, *b"some text"])
    monkeypatch.setattr("skipstone.model.open_engine", lambda _bundle, _options: engine)
    monkeypatch.setattr("skipstone.model.measure", measure)
    return budgets


def test_a_model_opened_twice_measures_once(tmp_path: Path, measured: list[float]) -> None:
    texts = []
    for _ in range(2):
        with Model(write_bundle(tmp_path)) as model:
            texts.append(model.generate(PROMPT, max_new_tokens=6, strategy="staged").text)
    assert texts == ["some t", "some t"]
    assert measured == [2.0]


def test_a_model_given_a_curve_measures_nothing_and_plans_with_it(
    tmp_path: Path, measured: list[float]
) -> None:
    with Model(write_bundle(tmp_path / "bundle")) as model:
        model.generate(PROMPT, max_new_tokens=2)
    (kept,) = (tmp_path / "bundle" / ".skipstone").glob("cost-*.json")
    content = json.loads(kept.read_text())
    content["curve"]["segments"] = [[1e-3, 1e-3], [5e-1, 5e-1]]
    file = tmp_path / "phone.json"
    file.write_text(json.dumps(content))
    kept.unlink()
    with load_model(tmp_path / "bundle", curve=file) as model:
        assert model.costs.plain == pytest.approx(0.501)
        model.generate(PROMPT, max_new_tokens=2)
    assert len(measured) == 1
    assert not kept.exists(), "a curve from elsewhere is not kept as this machine's"
    with pytest.raises(UsageError, match=r"--curve .*phone\.json: measured with other files"):
        load_model(write_changed(tmp_path / "changed"), curve=file)


def write_changed(folder: Path) -> Path:
    """The scripted bundle with another artefact."""
    from skipstone.bundle import describe_file, write_manifest

    bundle = write_bundle(folder)
    (folder / "segment-0.bin").write_bytes(b"another model")
    changed = describe_file(folder, "segment-0.bin")
    files = tuple(changed if entry.path == changed.path else entry for entry in bundle.manifest.files)
    write_manifest(folder, bundle.manifest.model_copy(update={"files": files}))
    return folder


@pytest.fixture(scope="module")
def bundle(coder_bundle_q8_0: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the reference model's bundle without any kept curve."""
    target = tmp_path_factory.mktemp("curves") / "coder"
    shutil.copytree(coder_bundle_q8_0, target, ignore=shutil.ignore_patterns(".skipstone"))
    return target


@pytest.mark.slow
@pytest.mark.engine
def test_a_curve_is_measured_written_kept_shown_and_taken_elsewhere(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "curve.json"
    done = skipstone("bench", bundle, "--curve-only", "--threads", "1", "--json", file)
    assert done.returncode == 0, done.stderr
    (kept,) = (bundle / ".skipstone").iterdir()
    assert str(kept) in done.stdout
    assert "segment 0" in done.stdout
    content = read_curve(file)
    assert content == MeasuredCurve.model_validate_json(kept.read_text())
    assert content.key.threads == 1
    assert not content.key.threads_chosen

    shown = skipstone("inspect", bundle)
    assert str(kept) in shown.stdout
    assert content.key.library in shown.stdout
    kept.write_text("{}")
    assert f"{kept}: ignored: not a cost curve" in skipstone("inspect", bundle).stdout
    kept.unlink()

    flags = ("--prompt", "def f(", "--max-new-tokens", "8", "--threads", "1", "--curve", file)
    done = skipstone("generate", bundle, *flags)
    assert done.returncode == 0, done.stderr
    assert not kept.exists()


@pytest.mark.engine
def test_a_curve_of_another_bundle_or_no_curve_is_refused_in_one_line(bundle: Path, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing.json"
    flags = ("--prompt", "def f(", "--curve", nothing)
    assert_refused(skipstone("generate", bundle, *flags), "--curve", "nothing.json", "--curve-only")
    nothing.write_text(json.dumps({"kind": "skipstone cost curve", "schema_version": 7}))
    assert_refused(skipstone("bench", bundle, "--curve", nothing), "schema version 7", "reads 1")
    assert_refused(
        skipstone("bench", bundle, "--curve-only", "--curve", nothing), "--curve-only", "leave one"
    )
    closed = tmp_path / "no" / "such" / "folder.json"
    assert_refused(skipstone("bench", bundle, "--curve-only", "--json", closed), "cannot be written")
