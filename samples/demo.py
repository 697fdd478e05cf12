"""The main job on the shipped model: export it, generate with the drafts coloured, compare the strategies.

python samples/demo.py
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "samples" / "models" / "coder"
PROMPTS = ROOT / "samples" / "prompts" / "code.jsonl"
PROMPT = "def read_lines(path):\n"


def skipstone(*arguments: str | Path) -> None:
    """Shows a command and runs it; a failure ends the demo with the command's own status."""
    print("\n$ skipstone", *(repr(a) if " " in str(a) else a for a in arguments), flush=True)
    command = Path(sys.executable).with_name("skipstone")
    status = subprocess.run([command, *arguments], check=False).returncode
    if status:
        sys.exit(status)


def is_current(bundle: Path, sources: list[Path]) -> bool:
    """True where the bundle is younger than the checkpoint and the exporter."""
    manifest = bundle / "manifest.json"
    if not manifest.exists():
        return False
    files = (path for source in sources for path in [source, *source.rglob("*")] if path.suffix != ".pyc")
    return manifest.stat().st_mtime > max(path.stat().st_mtime for path in files if path.is_file())


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Export, generate and benchmark the shipped model.")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "coder-q8_0", help="bundle to make")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="another model to show")
    parser.add_argument("--prompts", type=int, default=6, help="prompts of the benchmark")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; one per core")
    options = parser.parse_args()
    bundle, checkpoint = options.output, options.checkpoint
    if is_current(bundle, [checkpoint, ROOT / "exporters"]):
        print(f"{os.path.relpath(bundle)} is there and newer than its sources: not exported again")
    else:
        target = ("--device", "cpu", "--format", "gguf", "--quantize", "q8_0")
        skipstone("export", checkpoint, *target, "--output", bundle, "--overwrite")
    threads = () if options.threads is None else ("--threads", str(options.threads))
    skipstone("generate", bundle, "--prompt", PROMPT, "--max-new-tokens", "96", "--show-drafts", *threads)
    limits = ("--limit", str(options.prompts), "--max-new-tokens", "96")
    skipstone("bench", bundle, "--prompts", PROMPTS, *limits, *threads)


if __name__ == "__main__":
    main()
