"""The main job on the shipped model: export it, generate with the drafts coloured, compare the strategies.

python samples/demo.py
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "def read_lines(path):\n"


def skipstone(*arguments: str | Path) -> None:
    """Shows a command and runs it; a failure ends the demo with the command's own status."""
    print("\n$ skipstone", *map(str, arguments), flush=True)
    command = Path(sys.executable).with_name("skipstone")
    status = subprocess.run([command, *arguments], check=False).returncode
    if status:
        sys.exit(status)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Export, generate and benchmark the shipped model.")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "build" / "coder-q8_0", help="bundle to make or reuse"
    )
    bundle: Path = parser.parse_args().output
    if (bundle / "manifest.json").exists():
        print(f"{bundle} is there from an earlier run: not exported again")
    else:
        checkpoint = ROOT / "samples" / "models" / "coder"
        skipstone(
            "export",
            checkpoint,
            "--device",
            "cpu",
            "--format",
            "gguf",
            "--quantize",
            "q8_0",
            "--output",
            bundle,
        )
    skipstone("generate", bundle, "--prompt", PROMPT, "--max-new-tokens", "96", "--show-drafts")
    skipstone("bench", bundle)


if __name__ == "__main__":
    main()
