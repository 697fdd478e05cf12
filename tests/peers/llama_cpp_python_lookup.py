"""Compare with llama-cpp-python's `create_completion`, plain and with its prompt lookup, on the same weights.

    python -m tests.peers.llama_cpp_python_lookup

Its documentation advises drafts of 10 tokens for GPUs and of 2 for CPUs; both are run. Greedy, each system in a process
of its own.
"""

import sys
import tempfile
from pathlib import Path

from skipstone.exporters.checkpoint import open_checkpoint
from skipstone.exporters.formats.gguf.schemes import scheme_of
from skipstone.exporters.formats.gguf.vocabulary import tokenizer_keys
from skipstone.exporters.formats.gguf.whole import write_whole
from skipstone.exporters.isolation import run_isolated
from tests.peers.common import Settings, compare, export, parse_settings
from tests.peers.line_protocol import Worker

OWN = "create_completion"


def write_gguf(settings: Settings, folder: Path) -> Path:
    """The checkpoint as one GGUF with its tokenizer, quantised as the bundle."""
    checkpoint = open_checkpoint(settings.checkpoint)
    whole, target = folder / "f32.gguf", folder / "whole.gguf"
    write_whole(checkpoint, whole, tokenizer=tokenizer_keys(checkpoint, checkpoint.config.vocab_size))
    if settings.quantize == "f32":
        return whole
    run_isolated(
        "skipstone.exporters.formats.gguf.schemes:quantize_file",
        source=str(whole),
        target=str(target),
        file_type=scheme_of(settings.quantize).file_type,
        imatrix=None,
        threads=settings.threads,
    )
    return target


def main() -> None:
    """Entry point."""
    settings = parse_settings("Compare with llama-cpp-python.", "peers-llama-cpp-python.json", "q8_0")
    with tempfile.TemporaryDirectory() as folder:
        bundle, gguf = export(settings, Path(folder)), write_gguf(settings, Path(folder))
        kv = "f32" if settings.quantize == "f32" else "f16"
        module = "tests.peers.completion_worker"
        with Worker(Path(sys.executable), module, gguf, str(settings.threads), kv) as theirs:
            rows = {OWN: "plain", f"{OWN}, prompt lookup 2": "2", f"{OWN}, prompt lookup 10": "10"}
            compare(settings, bundle, theirs, rows)


if __name__ == "__main__":
    main()
