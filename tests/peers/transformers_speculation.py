"""Compare with transformers' self-speculation and prompt lookup, on the same f32 weights.

    python -m tests.peers.transformers_speculation

`assistant_early_exit` drafts with the first layers, as layerskip does; `prompt_lookup_num_tokens` copies from
the text. Greedy, eager attention of torch on the CPU, end-of-text tokens ignored on both sides.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from skipstone.benchmark.measure import Runner, Sample
from skipstone.bundle import open_bundle
from skipstone.inputs import ModelInput
from tests.peers.common import Settings, compare, export, parse_settings

LOOKUP = 10


class Clock(BaseStreamer):
    """Notes when the first new token came; the first call brings the prompt."""

    def __init__(self) -> None:
        self.calls = 0
        self.first: float | None = None

    def put(self, _value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 2:
            self.first = time.perf_counter()

    def end(self) -> None:
        return None


class TransformersRunner:
    """`model.generate` with some extra arguments."""

    def __init__(self, model: Any, max_new_tokens: int, **extra: Any) -> None:
        self._model, self._extra = model, extra
        self._config = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0, **extra
        )

    def __call__(self, given: ModelInput) -> Sample:
        ids, clock = torch.tensor([given.prompt]), Clock()
        began = time.perf_counter()
        with torch.inference_mode():
            out = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=self._config, streamer=clock
            )
        ended = time.perf_counter()
        first = clock.first if clock.first is not None else ended
        tokens = tuple(out[0, len(given.prompt) :].tolist())
        return Sample(tokens, first - began, ended - first, max(1, clock.calls - 2))


def load(settings: Settings) -> Any:
    """The checkpoint in f32, without any end of text."""
    torch.set_num_threads(settings.threads)
    model = AutoModelForCausalLM.from_pretrained(settings.checkpoint, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    return model.eval()


def main() -> None:
    """Entry point."""
    settings = parse_settings("Compare with transformers.", "peers-transformers.json", "f32")
    model = load(settings)
    with tempfile.TemporaryDirectory() as folder:
        bundle = export(settings, Path(folder))
        exit_layer = open_bundle(bundle).manifest.exits[0]

        def maker(**extra: Any) -> Any:
            def make() -> Runner:
                return TransformersRunner(model, settings.max_new_tokens, **extra)

            return make

        own = "transformers plain"
        peers = {
            own: maker(),
            "transformers assistant_early_exit": maker(assistant_early_exit=exit_layer),
            "transformers prompt_lookup": maker(prompt_lookup_num_tokens=LOOKUP),
        }
        about = {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "assistant_early_exit": str(exit_layer),
            "prompt_lookup_num_tokens": str(LOOKUP),
        }
        compare(settings, bundle, peers, dict.fromkeys(peers, own), about)


if __name__ == "__main__":
    main()
