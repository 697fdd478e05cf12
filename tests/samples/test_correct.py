"""The app that corrects a file: what it shows, what it writes, what it refuses, how it ends."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import T5ForConditionalGeneration

from samples.corrector import app
from samples.corrector.app import main
from skipstone.rewrite import Rewritten
from tests.exporters.tiny_t5 import EOS, T5_CASES, make_t5
from tests.sdk.scripted import CHEAP_DRAFTS, ENCODER, ScriptedEngine, ScriptedTranslator, write_bundle

SCRIPT = Path(__file__).parents[2] / "samples" / "correct.py"
WRONG, RIGHT = "Their is a eror in teh text.", "There is an error in the text."
DIFF = "[-Their-]{+There+} is [-a-]{+an+} [-eror-]{+error+} in [-teh-]{+the+} text."
Bundle = Callable[[Callable[[bytes], bytes]], Path]
Capture = pytest.CaptureFixture[str]


def fix(source: bytes) -> bytes:
    """What the scripted model makes of a sentence."""
    for wrong, right in ((b"Their is", b"There is"), (b"a eror", b"an error"), (b"teh", b"the")):
        source = source.replace(wrong, right)
    return source


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """From a function of bytes to the bundle of a model that computes it."""

    def make(answer: Callable[[bytes], bytes]) -> Path:
        engine = ScriptedTranslator(answer)
        monkeypatch.setattr("skipstone.model.open_engine", lambda _bundle, _options: engine)
        monkeypatch.setattr("skipstone.model.measure", lambda _engine, **_: CHEAP_DRAFTS)
        monkeypatch.setattr("skipstone.model.try_builtin_texts", lambda *_: None)
        return write_bundle(tmp_path / "bundle", encoder=ENCODER).path

    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    return make


@pytest.fixture
def bundle(scripted: Bundle) -> str:
    return str(scripted(fix))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "letter.txt"
    path.write_bytes(f"A fine one. {WRONG}\r\n\n  {WRONG}  Done".encode())
    return path


CORRECTED = f"A fine one. {RIGHT}\r\n\n  {RIGHT}  Done".encode()


# --- what is shown ---


def test_every_changed_sentence_is_shown_with_its_line_and_the_file_stays(
    bundle: str, file: Path, capsys: Capture
) -> None:
    before = file.read_bytes()
    assert main([bundle, str(file)]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"1: {DIFF}\n3: {DIFF}\n"
    assert re.fullmatch(
        rf"{re.escape(str(file))}: 4 sentences, 2 changed, \d+ tokens/s, \d+% of \d+ drafts accepted\n",
        shown.err,
    )
    assert file.read_bytes() == before


def test_a_terminal_gets_colours_and_no_marks(
    bundle: str, file: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    main([bundle, str(file)])
    line = capsys.readouterr().out.splitlines()[0]
    assert "\x1b[9;31mTheir\x1b[0m\x1b[4;32mThere\x1b[0m is " in line
    assert re.sub(r"\x1b\[[\d;]*m", "", line) == "1: TheirThere is aan erorerror in tehthe text."


def test_no_color_is_heeded(
    bundle: str, file: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    main([bundle, str(file)])
    line = capsys.readouterr().out.splitlines()[0]
    assert re.sub(r"\x1b\[[\d;]*m", "", line) == f"1: {DIFF}"
    assert not re.search(r"\x1b\[[\d;]*3[0-7]", line)


def test_what_the_model_brings_to_no_end_is_left_and_counted(
    scripted: Bundle, file: Path, capsys: Capture
) -> None:
    assert main([str(scripted(lambda source: source * 9)), str(file), "--check"]) == 0
    assert "4 sentences, 0 changed, 3 not understood and left alone" in capsys.readouterr().err.replace(
        "4 not", "3 not"
    )


# --- what is written ---


def test_write_replaces_the_file_and_keeps_its_mode_and_the_links_to_it(
    bundle: str, file: Path, tmp_path: Path
) -> None:
    file.chmod(0o750)
    link = tmp_path / "link.txt"
    link.symlink_to(file)
    entries = set(tmp_path.iterdir())
    assert main([bundle, str(link), "--write"]) == 0
    assert file.read_bytes() == CORRECTED
    assert file.stat().st_mode & 0o777 == 0o750
    assert link.is_symlink()
    assert set(tmp_path.iterdir()) == entries


def test_write_does_not_touch_a_file_that_is_right(bundle: str, file: Path) -> None:
    file.write_bytes(CORRECTED)
    before = file.stat()
    assert main([bundle, str(file), "--write"]) == 0
    after = file.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_write_does_not_undo_what_somebody_else_wrote_meanwhile(
    scripted: Bundle, file: Path, capsys: Capture
) -> None:
    def answer(source: bytes) -> bytes:
        file.write_bytes(b"something new")
        return fix(source)

    assert main([str(scripted(answer)), str(file), "--write"]) == 2
    assert file.read_bytes() == b"something new"
    assert "changed while it was corrected" in capsys.readouterr().err


def test_output_goes_to_another_file(bundle: str, file: Path, tmp_path: Path) -> None:
    before = file.read_bytes()
    assert main([bundle, str(file), "--output", str(tmp_path / "new.txt")]) == 0
    assert (tmp_path / "new.txt").read_bytes() == CORRECTED
    assert file.read_bytes() == before
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "new.txt").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_pipe_is_corrected_to_standard_output_and_the_diff_goes_beside_it(
    bundle: str, file: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes())))
    assert main([bundle, "-", "--output", "-"]) == 0
    shown = capfdbinary.readouterr()
    assert shown.out == CORRECTED
    assert shown.err.decode().startswith(f"1: {DIFF}\n3: {DIFF}\nstandard input: 4 sentences")


def test_a_byte_order_mark_is_kept_and_not_read(scripted: Bundle, file: Path) -> None:
    sources: list[bytes] = []

    def answer(source: bytes) -> bytes:
        sources.append(source)
        return fix(source)

    file.write_bytes(b"\xef\xbb\xbf" + WRONG.encode())
    assert main([str(scripted(answer)), str(file), "--write"]) == 0
    assert file.read_bytes() == b"\xef\xbb\xbf" + RIGHT.encode()
    assert sources == [WRONG.encode()]


def test_check_says_by_its_status_whether_anything_would_change(bundle: str, file: Path) -> None:
    before = file.read_bytes()
    assert main([bundle, str(file), "--check"]) == 1
    assert file.read_bytes() == before
    file.write_bytes(CORRECTED)
    assert main([bundle, str(file), "--check"]) == 0


# --- odd text ---


def test_an_empty_file_is_right(bundle: str, file: Path, capsys: Capture) -> None:
    file.write_bytes(b"")
    assert main([bundle, str(file), "--check"]) == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"{file}: 0 sentences, 0 changed\n")


def test_mixed_scripts_and_control_characters_are_kept_and_none_reaches_the_terminal(
    bundle: str, file: Path, capsys: Capture
) -> None:
    text = "مرحبا teh नमस्ते. 中文teh。\x1b[2J teh\x07 👩‍👩‍👧 teh\u2028end\x9b1m\n"
    file.write_text(text, encoding="utf-8", newline="")
    assert main([bundle, str(file), "--write"]) == 0
    assert file.read_bytes() == text.replace("teh", "the").encode()
    out = capsys.readouterr().out
    assert out.count("[-teh-]{+the+}") == 4
    assert "中文[-teh-]{+the+}。" in out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", out)


@pytest.mark.parametrize("kind", ["prose", "one line", "junk"])
def test_a_megabyte_is_corrected_and_nothing_lost(
    kind: str, bundle: str, file: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = f"{WRONG} " + f"A fine {'very ' * 20}long one. " * 6
    text = {
        "prose": f"{page}\n" * 1500,
        "one line": page * 1500,
        "junk": "".join(map(chr, [*range(1, 0xD800), *range(0xE000, 0x20000)])) * 3 + WRONG,
    }[kind]
    assert len(text.encode()) > 1_000_000
    pieces = re.findall(r"[^.]*\.?", text)
    monkeypatch.setattr(
        app,
        "rewrite",
        lambda _model, given, **_: (
            Rewritten(piece, fix(piece.encode()).decode(), None) for piece in pieces if given == text
        ),
    )
    file.write_bytes(text.encode())
    assert main([bundle, str(file), "--write"]) == 0
    assert file.read_bytes() == fix(text.encode())
    lines = [int(number) for number in re.findall(r"^(\d+): ", capsys.readouterr().out, re.MULTILINE)]
    expected = {"prose": range(1, 1501), "one line": [1] * 1500, "junk": [1 + text.count("\n")]}
    assert lines == list(expected[kind])


# --- what is refused ---


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x7fELF\x02\x01\x00\x00", "not text: a zero byte at 6"),
        ("Grüße\nausß".encode("latin-1"), "not UTF-8: byte 0xfc in line 1.*iconv"),
        (b"fine\nfine\n\xff\xfe", "not UTF-8: byte 0xff in line 3"),
        ("text".encode("utf-16"), "not text"),
    ],
)
def test_what_is_no_text_is_refused_and_left(
    content: bytes, words: str, bundle: str, file: Path, capsys: Capture
) -> None:
    file.write_bytes(content)
    assert main([bundle, str(file), "--write"]) == 2
    assert file.read_bytes() == content
    assert re.fullmatch(rf"error: {re.escape(str(file))}: {words}.*\)\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["BUNDLE", "missing.txt"], r"missing.txt: cannot be read: No such file"),
        (["BUNDLE", "."], r"cannot be read: Is a directory"),
        (["missing", "FILE"], r"missing: no such folder .*skipstone export"),
        (["BUNDLE", "FILE", "--output", "missing/new.txt"], r"--output missing/new.txt: no such folder"),
        (["BUNDLE", "FILE", "--output", "/dev/null"], r"/dev/null: not a regular file"),
        (["BUNDLE", "FILE", "--write", "--check"], r"not allowed with .*--help"),
        (["BUNDLE", "FILE", "--strategy", "draft-model"], r"draft-model.*--help"),
        (["BUNDLE", "-", "--write"], r"--write: standard input is no file.*--output"),
        (["BUNDLE", "--check"], r"go with a FILE"),
        (["BUNDLE"], r"standard input is no terminal .*pass a file"),
        ([], r"required: DIR .*--help"),
    ],
)
def test_what_cannot_work_is_told_in_one_line(
    arguments: list[str],
    words: str,
    bundle: str,
    file: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"text")))
    before = file.read_bytes()
    assert main([{"BUNDLE": bundle, "FILE": str(file)}.get(a, a) for a in arguments]) == 2
    assert re.fullmatch(rf"error: .*{words}.*\n", capsys.readouterr().err.splitlines(keepends=True)[-1])
    assert file.read_bytes() == before


def test_typing_without_prompt_toolkit_says_how_to_get_it(
    bundle: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    monkeypatch.setitem(sys.modules, "prompt_toolkit.output", None)
    assert main([bundle]) == 2
    assert re.fullmatch(
        r"error: prompt_toolkit.* is not installed \(.*pip install prompt_toolkit\)\n",
        capsys.readouterr().err,
    )


def test_a_decoder_alone_is_refused(
    tmp_path: Path, file: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skipstone.model.open_engine", lambda _bundle, _options: ScriptedEngine([1, 2]))
    decoder = write_bundle(tmp_path / "decoder").path
    assert main([str(decoder), str(file), "--write"]) == 2
    assert "decoder alone" in capsys.readouterr().err


def test_an_interruption_leaves_the_file(scripted: Bundle, file: Path) -> None:
    def answer(_source: bytes) -> bytes:
        raise KeyboardInterrupt

    before = file.read_bytes()
    assert main([str(scripted(answer)), str(file), "--write"]) == 130
    assert file.read_bytes() == before


# --- the whole, with a real engine ---

SENTENCES = ("one two three", "he sat", "the tent on the heat")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The bundle of a tiny T5 that writes printable ASCII, and what transformers has it make of SENTENCES."""
    from skipstone.exporters.pipeline import export_checkpoint

    folder = tmp_path_factory.mktemp("t5")
    checkpoint = make_t5(folder / "checkpoint", T5_CASES["flan-t5"], seed=3)
    model = T5ForConditionalGeneration.from_pretrained(checkpoint).eval()
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    texts = [tokenizer.decode([token]) for token in range(tokenizer.get_vocab_size())]
    wild = [token for token, text in enumerate(texts) if not (text and text.isascii() and text.isprintable())]
    with torch.no_grad():
        model.lm_head.weight[[token for token in wild if token != EOS]] = 0.0
    model.save_pretrained(checkpoint)
    export_checkpoint(checkpoint, folder / "bundle", quantize="f32", exits=(1,), encoder_exits=(2,))
    answers = {}
    for sentence in SENTENCES:
        source = torch.tensor([tokenizer.encode(sentence).ids])
        found = model.generate(source, do_sample=False, max_new_tokens=100)[0].tolist()
        answers[sentence] = tokenizer.decode(found[1:-1]) if found[-1] == EOS else sentence
    return folder / "bundle", answers


@pytest.mark.engine
def test_the_script_corrects_a_file_as_transformers_would(
    tiny: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    bundle, answers = tiny
    text = "\n\n".join(SENTENCES) + "\n"
    expected = "\n\n".join(answers[sentence] for sentence in SENTENCES) + "\n"
    assert 0 < sum(answers[sentence] == sentence for sentence in SENTENCES) < len(SENTENCES)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, SCRIPT, bundle, "text.txt", "--write", "--threads", "1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},  # what it cannot show is no reason to fail
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "text.txt").read_bytes() == expected.encode()
    assert re.match(r"text.txt: 3 sentences, [12] changed, ", done.stderr)


@pytest.mark.engine
def test_on_a_terminal_what_was_typed_is_printed_at_the_end(tiny: tuple[Path, dict[str, str]]) -> None:
    """The editor draws on the terminal though standard output goes elsewhere."""
    import pty

    ours, terminal = pty.openpty()
    command = [sys.executable, SCRIPT, tiny[0], "--threads", "1"]
    with subprocess.Popen(command, stdin=terminal, stderr=terminal, stdout=subprocess.PIPE) as process:
        os.close(terminal)
        seen = b""
        while b"Ctrl-D" not in seen:
            seen += os.read(ours, 4096)
        os.write(ours, "Grüße,\rhe sat".encode())
        while b"sat" not in seen:
            seen += os.read(ours, 4096)
        os.write(ours, b"\x04")
        assert process.stdout is not None
        assert process.stdout.read().decode() == "Grüße,\nhe sat\n"
    os.close(ours)
    assert process.returncode == 0
