"""What a user could run instead, on the same model as one whole GGUF: a bare `llama_decode` loop, and
llama-cpp-python's `create_completion`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from skipstone.benchmark.measure import Sample
from skipstone.errors import EngineError, UsageError
from skipstone.inputs import ModelInput
from skipstone.runtimes.engines.llamacpp.kv_types import KV_TYPES
from skipstone.runtimes.engines.llamacpp.library import library

_BATCH = 512
_UNKNOWN = -1


@dataclass(frozen=True)
class BaselineOptions:
    """A whole GGUF, run with the settings the bundle runs with.

    Attributes:
        path: the file.
        threads: CPU threads.
        context_length: positions.
        kv_type: type of K and V.
    """

    path: Path
    threads: int
    context_length: int
    kv_type: str


class Baseline(Protocol):
    """A runner that holds weights. Greedy."""

    def __call__(self, given: ModelInput) -> Sample: ...

    def close(self) -> None:
        """Free everything. Idempotent."""


class LlamaDecodeLoop:
    """The least that Python can do: fill one batch, `llama_decode`, take the largest logit."""

    def __init__(self, options: BaselineOptions, max_new_tokens: int, eos: Sequence[int]) -> None:
        llama = self._llama = library().llama
        self._limit, self._eos, self._context, self._batch = max_new_tokens, frozenset(eos), None, None
        self._model = llama.llama_model_load_from_file(
            str(options.path).encode(), llama.llama_model_default_params()
        )
        if not self._model:
            raise EngineError(f"{options.path}: llama.cpp cannot load this file", hint="pass a whole GGUF")
        params = llama.llama_context_default_params()
        params.n_ctx = options.context_length
        params.n_batch = params.n_ubatch = _BATCH
        params.n_threads = params.n_threads_batch = options.threads
        kv = KV_TYPES[options.kv_type]
        params.flash_attn_type = int(kv.is_quantized)
        params.type_k = params.type_v = kv.number
        params.no_perf = True
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            self.close()
            raise EngineError(
                f"{options.path}: no context of {options.context_length} positions",
                hint="pass a smaller --context-length",
            )
        self._memory = llama.llama_get_memory(self._context)
        self._batch = llama.llama_batch_init(_BATCH, 0, 1)
        self._vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))

    def __call__(self, given: ModelInput) -> Sample:
        prompt = given.prompt
        self._llama.llama_memory_clear(self._memory, False)
        began = time.perf_counter()
        for start in range(0, len(prompt), _BATCH):
            self._decode(prompt[start : start + _BATCH], start)
        tokens = [self._best()]
        first = time.perf_counter()
        while len(tokens) < self._limit and tokens[-1] not in self._eos:
            self._decode(tokens[-1:], len(prompt) + len(tokens) - 1)
            tokens.append(self._best())
        ended = time.perf_counter()
        return Sample(tuple(tokens), first - began, ended - first, len(tokens) - 1)

    def close(self) -> None:
        """Free everything. Idempotent."""
        if self._batch is not None:
            self._llama.llama_batch_free(self._batch)
        if self._context:
            self._llama.llama_free(self._context)
        if self._model:
            self._llama.llama_model_free(self._model)
        self._batch = self._context = self._model = None

    def _decode(self, tokens: Sequence[int], start: int) -> None:
        batch: Any = self._batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index] = token, start + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = index == len(tokens) - 1
        status = self._llama.llama_decode(self._context, batch)
        if status != 0:
            raise EngineError(f"llama_decode gave {status}", hint="raise --context-length")

    def _best(self) -> int:
        pointer = self._llama.llama_get_logits_ith(self._context, -1)
        logits = np.ctypeslib.as_array(pointer, (self._vocab,))
        return int(logits.argmax())


class CreateCompletion:
    """llama-cpp-python's high-level call; the prompt goes in as token ids.

    It ends at an end-of-text token whatever is asked, and tells no token ids: its output is not compared.
    """

    def __init__(self, options: BaselineOptions, max_new_tokens: int, _eos: Sequence[int]) -> None:
        llama, kv = library().llama, KV_TYPES[options.kv_type]
        self._module = llama
        try:
            self._llama = llama.Llama(
                str(options.path),
                n_ctx=options.context_length,
                n_threads=options.threads,
                n_threads_batch=options.threads,
                flash_attn=kv.is_quantized,
                type_k=kv.number,
                type_v=kv.number,
                verbose=False,
            )
        except ValueError as error:
            raise EngineError(f"{options.path}: {error}", hint="pass a whole GGUF") from error
        self._limit = max_new_tokens

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
            stopping_criteria=self._module.StoppingCriteriaList([tick]),
        )
        ended = time.perf_counter()
        count = len(times) - 1  # it asks once more when all is over
        return Sample((_UNKNOWN,) * count, times[0] - began, ended - times[0], count - 1)

    def close(self) -> None:
        """Free everything. Idempotent."""
        self._llama.close()


BASELINES: dict[str, Callable[[BaselineOptions, int, Sequence[int]], Baseline]] = {
    "llama_decode": LlamaDecodeLoop,
    "create_completion": CreateCompletion,
}


def check_whole_gguf(path: Path | None, vocab_size: int) -> Path:
    """The file for the baselines.

    llama.cpp ends the process when it is given a token outside the vocabulary, or is asked for the text of a
    token and has no tokenizer, so both are made sure of here.

    Args:
        path: as the user gave it.
        vocab_size: of the bundle it is compared with.

    Raises:
        UsageError: none given, not a GGUF, without a tokenizer, or of another vocabulary.
    """
    if path is None:
        raise UsageError("--baselines: needs the whole model as one GGUF", hint="pass --whole-gguf FILE")
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise UsageError(f"--whole-gguf {path}: cannot be read: {error}") from error
    if magic != b"GGUF":
        raise UsageError(f"--whole-gguf {path}: not a GGUF file", hint="pass the uncut model as one GGUF")
    found = _vocabulary_size(path)
    if found != vocab_size:
        raise UsageError(
            f"--whole-gguf {path}: {found or 'no'} tokens with text, the bundle has {vocab_size}",
            hint="pass the whole model, with its tokenizer, that the bundle was made from",
        )
    return path


def _vocabulary_size(path: Path) -> int:
    """Number of tokens; 0 without a tokenizer."""
    llama = library().llama
    params = llama.llama_model_default_params()
    params.vocab_only = True
    model = llama.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise EngineError(f"{path}: llama.cpp cannot load this file", hint="pass a whole GGUF")
    try:
        vocab = llama.llama_model_get_vocab(model)
        has_text = llama.llama_vocab_type(vocab) != llama.LLAMA_VOCAB_TYPE_NONE
        return int(llama.llama_vocab_n_tokens(vocab)) if has_text else 0
    finally:
        llama.llama_model_free(model)
