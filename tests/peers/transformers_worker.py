"""transformers' own generation behind `serve`, in f32: rows `plain`, `prompt_lookup`, `assistant`.

    python -m tests.peers.transformers_worker CHECKPOINT THREADS EXIT

`prompt_lookup` copies from the text (of an encoder-decoder from what the decoder wrote: it does not look at the
source). `assistant` drafts with the first EXIT layers: of a decoder by `assistant_early_exit`, of an encoder-decoder,
whose classes lack that, by `assistant_model`, the same model with its decoder cut. Greedy, torch on the CPU.
"""

import copy
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from tests.peers.line_protocol import Answer, Generate, Request, serve

LOOKUP = 10


class Clock(BaseStreamer):
    """Notes when the first new token came; the first call brings what the output begins with."""

    def __init__(self) -> None:
        self.calls = 0
        self.first: float | None = None

    def put(self, _value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 2:
            self.first = time.perf_counter()

    def end(self) -> None:
        return None


def start() -> tuple[Generate, dict[str, str]]:
    """Load the checkpoint."""
    checkpoint, threads, exit_layer = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    pair = AutoConfig.from_pretrained(checkpoint).is_encoder_decoder
    kind: Any = AutoModelForSeq2SeqLM if pair else AutoModelForCausalLM
    model = kind.from_pretrained(checkpoint, dtype=torch.float32).eval()
    eos = model.config.eos_token_id if pair else None
    model.generation_config.eos_token_id = model.config.eos_token_id = eos
    extras: dict[str, dict[str, Any]] = {
        "plain": {},
        "prompt_lookup": {"prompt_lookup_num_tokens": LOOKUP},
        "assistant": {} if pair else {"assistant_early_exit": exit_layer},
    }
    assistant = {"assistant_model": cut(model, exit_layer)} if pair else {}

    def generate(request: Request) -> Answer:
        config = GenerationConfig(
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=model.config.pad_token_id or 0,
            decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
            **extras[request.row],
        )
        ids, clock = torch.tensor([request.source or request.prompt]), Clock()
        began = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                streamer=clock,
                **(assistant if request.row == "assistant" else {}),
            )
        ended = time.perf_counter()
        first = clock.first if clock.first is not None else ended
        written = out[0, 1 if pair else len(request.prompt) :].tolist()
        tokens = tuple(token for token in written if token != eos)
        return Answer(tokens, first - began, ended - first, max(1, clock.calls - 2))

    told = {"assistant": f"the first {exit_layer} layers", "prompt_lookup_num_tokens": str(LOOKUP)}
    return generate, {name: version(name) for name in ("transformers", "torch")} | told


def cut(model: Any, num_layers: int) -> Any:
    """The same encoder-decoder with the first layers of its decoder only, sharing all weights."""
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


if __name__ == "__main__":
    serve(start)
