"""optimum-executorch's own generation loop behind `serve`; runs in its environment, without ours.

python -m tests.peers.optimum_executorch_worker FOLDER THREADS
"""

import sys
import time
from importlib.metadata import version

from tests.peers.line_protocol import Answer, Generate, Request, serve


def start() -> tuple[Generate, dict[str, str]]:
    """Load FOLDER/model.pte with `ExecuTorchModelForCausalLM`."""
    from executorch.extension.pybindings import portable_lib
    from optimum.executorch import ExecuTorchModelForCausalLM
    from optimum.executorch.stats import Stats

    class Clock(Stats):
        """Its own statistics, which count whole milliseconds, and the exact time of the first token."""

        first = 0.0

        def on_prompt_eval_end(self) -> None:
            super().on_prompt_eval_end()
            self.first = time.perf_counter()

    folder, threads = sys.argv[1], int(sys.argv[2])
    portable_lib._unsafe_reset_threadpool(threads)
    model = ExecuTorchModelForCausalLM.from_pretrained(folder)
    model.stats = clock = Clock()
    model.eos_token_ids = []  # goes on after an end of text, as the other side does

    def generate(request: Request) -> Answer:
        prompt = list(request.prompt)
        clock.reset()
        began = time.perf_counter()
        tokens = model.generate(prompt, max_seq_len=len(prompt) + request.max_new_tokens)
        ended = time.perf_counter()
        return Answer(tuple(tokens), clock.first - began, ended - clock.first)

    packages = ("optimum-executorch", "executorch", "transformers", "torch")
    about = {name: version(name) for name in packages}
    return generate, about | {"threads": str(portable_lib._threadpool_get_thread_count())}


if __name__ == "__main__":
    serve(start)
