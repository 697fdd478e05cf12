"""llama-cpp-python's `create_completion` behind `serve`: rows `plain`, and `2` and `10`, what its prompt lookup drafts.

python -m tests.peers.completion_worker GGUF THREADS KV_TYPE
"""

import sys
import time
from importlib.metadata import version

import llama_cpp
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from tests.peers.line_protocol import Answer, Generate, Request, serve

CONTEXT = 1024
KV_TYPES = {"f32": 0, "f16": 1}


def start() -> tuple[Generate, dict[str, str]]:
    """Load the GGUF once for every row: how it drafts is fixed when it is loaded."""
    gguf, threads, kv = sys.argv[1], int(sys.argv[2]), KV_TYPES[sys.argv[3]]

    def load(draft: int | None) -> llama_cpp.Llama:
        return llama_cpp.Llama(
            gguf,
            n_ctx=CONTEXT,
            n_threads=threads,
            n_threads_batch=threads,
            type_k=kv,
            type_v=kv,
            draft_model=None if draft is None else LlamaPromptLookupDecoding(num_pred_tokens=draft),
            verbose=False,
        )

    models = {"plain": load(None), "2": load(2), "10": load(10)}

    def generate(request: Request) -> Answer:
        llama, times = models[request.row], []
        llama.reset()

        def tick(_ids: object, _logits: object) -> bool:  # a stopping criterion is asked after every token
            times.append(time.perf_counter())
            return False

        began = time.perf_counter()
        llama.create_completion(
            list(request.prompt),
            max_tokens=request.max_new_tokens,
            temperature=0.0,
            stopping_criteria=llama_cpp.StoppingCriteriaList([tick]),
        )
        ended = time.perf_counter()
        count = len(times) - 1  # it asks once more when all is over
        return Answer((-1,) * count, times[0] - began, ended - times[0], max(1, count - 1))

    return generate, {"llama-cpp-python": version("llama-cpp-python")}


if __name__ == "__main__":
    serve(start)
