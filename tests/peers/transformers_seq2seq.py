"""Compare an encoder-decoder with transformers' own generation, on the same f32 weights.

    python -m tests.peers.transformers_seq2seq

`prompt_lookup_num_tokens` copies from what the decoder wrote (of an encoder-decoder it does not look at the
source); `assistant_model` drafts with the same model, its decoder cut at the first exit. Greedy, attention of torch on
the CPU, every output up to its end.
"""

import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForSeq2SeqLM, GenerationConfig

from skipstone.benchmark.measure import Runner, Sample
from skipstone.bundle import open_bundle
from skipstone.inputs import ModelInput
from tests.peers.common import Settings, compare, export, parse_settings
from tests.peers.transformers_speculation import LOOKUP, Clock

OURS = ("plain", "aggressive", "staged", "auto")


class Seq2SeqRunner:
    """`model.generate` on a source; `lookup` and `assistant` draft."""

    def __init__(
        self, model: Any, max_new_tokens: int, lookup: int | None = None, assistant: Any = None
    ) -> None:
        self._model, self._eos = model, model.config.eos_token_id
        self._extra = {} if assistant is None else {"assistant_model": assistant}
        self._config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=self._eos,
            pad_token_id=model.config.pad_token_id,
            decoder_start_token_id=model.config.decoder_start_token_id,
            prompt_lookup_num_tokens=lookup,
        )

    def __call__(self, given: ModelInput) -> Sample:
        ids, clock = torch.tensor([given.source]), Clock()
        began = time.perf_counter()
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self._config,
                streamer=clock,
                **self._extra,
            )
        ended = time.perf_counter()
        first = clock.first if clock.first is not None else ended
        tokens = tuple(token for token in out[0, 1:].tolist() if token != self._eos)
        return Sample(tokens, first - began, ended - first, max(1, clock.calls - 2))


def load(settings: Settings) -> Any:
    """The checkpoint in f32."""
    torch.set_num_threads(settings.threads)
    model = AutoModelForSeq2SeqLM.from_pretrained(settings.checkpoint, dtype=torch.float32)
    return model.eval()


def cut(model: Any, num_layers: int) -> Any:
    """The same model with the first layers of its decoder only, sharing all weights."""
    shallow = copy.copy(model)
    shallow._modules = dict(model._modules)
    shallow.config = copy.deepcopy(model.config)
    shallow.generation_config = copy.deepcopy(model.generation_config)
    shallow.config.num_decoder_layers = num_layers
    decoder = copy.copy(model.decoder)
    decoder._modules = dict(model.decoder._modules)
    decoder.config = copy.deepcopy(model.decoder.config)
    decoder.config.num_layers = num_layers
    decoder.block = model.decoder.block[:num_layers]
    shallow.decoder = decoder
    return shallow


def main() -> None:
    """Entry point."""
    settings = parse_settings(
        "Compare with transformers.",
        "peers-transformers-seq2seq.json",
        "f32",
        model="speller",
        prompts="speller_held_out.jsonl",
    )
    model = load(settings)
    with tempfile.TemporaryDirectory() as folder:
        bundle = export(settings, Path(folder))
        exit_layer = open_bundle(bundle).manifest.exits[0]
        own = "transformers plain"
        extras: dict[str, dict[str, Any]] = {
            own: {},
            "transformers prompt_lookup": {"lookup": LOOKUP},
            "transformers assistant_model": {"assistant": cut(model, exit_layer)},
        }

        def maker(extra: dict[str, Any]) -> Any:
            def make() -> Runner:
                return Seq2SeqRunner(model, settings.max_new_tokens, **extra)

            return make

        peers = {name: maker(extra) for name, extra in extras.items()}
        about = {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "assistant_model": f"the model with {exit_layer} layers of its decoder",
            "prompt_lookup_num_tokens": str(LOOKUP),
        }
        compare(settings, bundle, peers, dict.fromkeys(peers, own), about, OURS)


if __name__ == "__main__":
    main()
