"""A whole GGUF in llama.cpp through its low-level API: logits, and a look at what every matrix is multiplied
with.

Only ever used in a process of its own (`skipstone.exporters.isolation`): a damaged file can abort it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from skipstone.errors import EngineError
from skipstone.exporters.isolation import num_threads
from skipstone.runtimes.engines.llamacpp.thread import undisturbed

FloatArray = NDArray[np.float32]

# (context parameters' callback): tensor, whether it asks, user data → wanted / go on
EvalCallback = Callable[[Any, bool, Any], bool]

_KV_F32 = 0
_FLASH_ATTENTION_OFF = 0


class WholeModel:
    """A model with one sequence; K/V in f32 and no flash attention, so that results are as exact as the
    weights.

    Args:
        path: a whole GGUF.
        num_tokens: most tokens to be run at once.
        callback: told of every node of the graph, see llama.cpp's `cb_eval`.
        repack: False where this build's kernels for repacked weights cannot be trusted.

    Raises:
        EngineError: llama.cpp does not load the file.
    """

    def __init__(
        self, path: Path, num_tokens: int, *, callback: EvalCallback | None = None, repack: bool = True
    ) -> None:
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        model_params.use_extra_bufts = repack
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
        if not self._model:
            raise EngineError(
                f"{path}: llama.cpp does not load it", hint="the file is damaged or of an unknown kind"
            )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = num_tokens
        params.n_threads = params.n_threads_batch = num_threads(llama_cpp.llama_model_size(self._model))
        params.type_k = params.type_v = _KV_F32
        params.flash_attn_type = _FLASH_ATTENTION_OFF
        if callback is not None:
            fields: dict[str, Any] = {field[0]: field[1] for field in llama_cpp.llama_context_params._fields_}
            self._callback = fields["cb_eval"](callback)
            params.cb_eval = self._callback
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            llama_cpp.llama_model_free(self._model)
            raise EngineError(f"{path}: llama.cpp gives no context for {num_tokens} tokens")
        self.num_tokens = num_tokens
        self.vocab_size = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model)))

    def logits(self, tokens: Sequence[int]) -> FloatArray:
        """Logits [n, vocab_size] after every token of a fresh sequence.

        Raises:
            EngineError: llama.cpp refused.
        """
        count = len(tokens)
        if not 0 < count <= self.num_tokens:
            raise EngineError(f"{count} tokens at once: this context takes 1 to {self.num_tokens}")
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        status = self._run(llama_cpp.llama_decode, tokens)
        if status != 0:
            raise EngineError(f"llama_decode returned {status}")
        pointer = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, shape=(count, self.vocab_size)).copy()

    def encode(self, source: Sequence[int]) -> None:
        """Run an encoder-decoder's encoder; the tokens given to `logits` attend to what it gives.

        Raises:
            EngineError: a decoder alone, or llama.cpp refused.
        """
        count = len(source)
        if not llama_cpp.llama_model_has_encoder(self._model):
            raise EngineError("this model has no encoder")
        if not 0 < count <= self.num_tokens:
            raise EngineError(f"{count} tokens at once: this context takes 1 to {self.num_tokens}")
        status = self._run(llama_cpp.llama_encode, source)
        if status != 0:
            raise EngineError(f"llama_encode returned {status}")

    def _run(self, call: Callable[[Any, Any], int], tokens: Sequence[int]) -> int:
        """`call` the tokens of a fresh sequence; its status."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index] = int(token), index
            batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, 1
        status = undisturbed(lambda: call(self._context, batch))
        llama_cpp.llama_batch_free(batch)
        return status

    def close(self) -> None:
        """Free context and model."""
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)


@contextmanager
def whole_model(
    path: Path, num_tokens: int, callback: EvalCallback | None = None, *, repack: bool = True
) -> Iterator[WholeModel]:
    """A `WholeModel`, closed at the end."""
    model = WholeModel(path, num_tokens, callback=callback, repack=repack)
    try:
        yield model
    finally:
        model.close()


def save_logits(source: str, tokens: list[int], target: str) -> None:
    """Logits of a whole GGUF over `tokens`, [n, vocab_size] float32, into a .npy file."""
    with whole_model(Path(source), len(tokens)) as model:
        np.save(target, model.logits(tokens))
