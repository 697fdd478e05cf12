"""Compare with llama-cpp-python's `create_completion`, plain and with its prompt lookup, on the same weights.

    python -m tests.peers.llama_cpp_python_lookup

Its documentation advises drafts of 10 tokens for GPUs and of 2 for CPUs; both are run. Greedy.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import llama_cpp
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from skipstone.benchmark.measure import Runner, Sample
from skipstone.exporters.checkpoint import open_checkpoint
from skipstone.exporters.formats.gguf.schemes import scheme_of
from skipstone.exporters.formats.gguf.vocabulary import tokenizer_keys
from skipstone.exporters.formats.gguf.whole import write_whole
from skipstone.exporters.isolation import run_isolated
from skipstone.inputs import ModelInput
from tests.peers.common import Settings, compare, export, parse_settings

CONTEXT = 1024
F16, F32 = 1, 0


class CompletionRunner:
    """`create_completion` on a whole GGUF; a stopping criterion, asked after every token, notes the times."""

    def __init__(self, gguf: Path, settings: Settings, draft: int | None) -> None:
        kv = F32 if settings.quantize == "f32" else F16
        self._limit = settings.max_new_tokens
        self._llama = llama_cpp.Llama(
            str(gguf),
            n_ctx=CONTEXT,
            n_threads=settings.threads,
            n_threads_batch=settings.threads,
            type_k=kv,
            type_v=kv,
            draft_model=None if draft is None else LlamaPromptLookupDecoding(num_pred_tokens=draft),
            verbose=False,
        )

    def __call__(self, given: ModelInput) -> Sample:
        self._llama.reset()
        times: list[float] = []

        def tick(_ids: object, _logits: object) -> bool:
            times.append(time.perf_counter())
            return False

        began = time.perf_counter()
        self._llama.create_completion(
            list(given.prompt),
            max_tokens=self._limit,
            temperature=0.0,
            stopping_criteria=llama_cpp.StoppingCriteriaList([tick]),
        )
        ended = time.perf_counter()
        count = len(times) - 1  # it asks once more when all is over
        return Sample((-1,) * count, times[0] - began, ended - times[0], max(1, count - 1))


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
        bundle = export(settings, Path(folder))
        gguf = write_gguf(settings, Path(folder))
        own = "create_completion"
        runners = {
            own: CompletionRunner(gguf, settings, None),
            "create_completion, prompt lookup 2": CompletionRunner(gguf, settings, 2),
            "create_completion, prompt lookup 10": CompletionRunner(gguf, settings, 10),
        }
        peers: dict[str, Callable[[], Runner]] = {
            name: (lambda runner=runner: runner) for name, runner in runners.items()
        }
        about = {"llama-cpp-python": llama_cpp.__version__}
        compare(settings, bundle, peers, dict.fromkeys(peers, own), about)


if __name__ == "__main__":
    main()
