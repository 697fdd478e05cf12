"""A lane: one GGUF part with its own llama.cpp context, fed with hidden states through a reused batch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstone.errors import ContextFullError, EngineError
from skipstone.runtimes.engines.llamacpp.library import FLOAT_BYTES, GGML_TYPES, library
from skipstone.runtimes.engines.llamacpp.thread import undisturbed

FloatArray = NDArray[np.float32]
_NO_ROOM = 1


@dataclass(frozen=True)
class LaneOptions:
    """How contexts are made.

    Attributes:
        threads: CPU threads of a part, unless it is given others.
        kv_type: ggml type of K and V (`f16`, `f32`).
        max_width: rows per batch.
        max_branches: sequences, i.e. leaves of an uncommitted tree, plus the context's own.
        extra_buffers: repacked weights (AMX, interleaved rows); off where a build's code for them is broken.
    """

    threads: int
    kv_type: str = "f16"
    max_width: int = 64
    max_branches: int = 64
    extra_buffers: bool = True


@dataclass(frozen=True)
class Threads:
    """Threads for a single row, and for batches of more."""

    one: int
    more: int


class Part:
    """The weights of one GGUF file.

    Attributes:
        threads: that its lanes begin with.
    """

    def __init__(self, path: Path, options: LaneOptions, *, gpu_layers: int = 0) -> None:
        lib = library()
        if not path.is_file():
            raise EngineError(f"{path}: no such file", hint="export the bundle again")
        params = lib.llama.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        params.use_extra_bufts = options.extra_buffers
        self.path = path
        self.threads = Threads(options.threads, options.threads)
        self.handle = lib.llama.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise EngineError(f"{path}: llama.cpp cannot load this file", hint="export the bundle again")
        self.hidden_size = int(lib.llama.llama_model_n_embd(self.handle))
        self.num_layers = int(lib.llama.llama_model_n_layer(self.handle))
        self.vocab_size = int(lib.llama.llama_vocab_n_tokens(lib.llama.llama_model_get_vocab(self.handle)))

    def close(self) -> None:
        """Free the weights. Idempotent."""
        if self.handle:
            library().llama.llama_model_free(self.handle)
            self.handle = None


class Lane:
    """A context on a part: its K/V, its batch, and one way out for the rows (`nextn`, `callback` or `logits`).

    The batch's memory is ours (numpy) and reused: filling it costs microseconds where building one costs tens.
    """

    def __init__(self, part: Part, output: str, context_length: int, options: LaneOptions) -> None:
        lib = library()
        self._llama, self._ext = lib.llama, lib.extensions
        self.part, self.output, self._width = part, output, options.max_width
        self._tap = _Tap(part.num_layers, part.hidden_size) if output == "callback" else None
        params = self._llama.llama_context_default_params()
        # llama.cpp aborts on a context smaller than its batch or its number of sequences
        params.n_ctx = max(context_length, options.max_width, options.max_branches)
        params.n_batch = params.n_ubatch = options.max_width
        params.n_seq_max = options.max_branches
        params.n_threads, params.n_threads_batch = part.threads.one, part.threads.more
        params.kv_unified = True
        params.flash_attn_type = 0
        params.type_k = params.type_v = GGML_TYPES[options.kv_type]
        params.no_perf = True
        if self._tap is not None:
            params.cb_eval = self._tap.callback
        self._context = self._llama.llama_init_from_model(part.handle, params)
        if not self._context:
            raise EngineError(
                f"{part.path}: llama.cpp cannot make a context of {context_length} positions",
                hint="pass a smaller --context-length or free memory",
            )
        if output == "nextn":
            self._ext.llama_set_embeddings_nextn(self._context, True, False)
        self._memory = self._llama.llama_get_memory(self._context)
        self._wide = False
        self._make_batch(options)

    def _make_batch(self, options: LaneOptions) -> None:
        width, seqs = options.max_width, options.max_branches
        self.embeddings = np.zeros((width, self.part.hidden_size), np.float32)
        self.positions = np.zeros(width, np.int32)
        self.flags = np.zeros(width, np.int8)
        self.seq_counts = np.ones(width, np.int32)
        self.seq_ids = np.zeros((width, seqs), np.int32)
        stride, start = seqs * self.seq_ids.itemsize, self.seq_ids.ctypes.data
        self._seq_rows = (ctypes.c_void_p * width)(*(start + index * stride for index in range(width)))
        self._batch = batch = self._llama.llama_batch()

        def pointer(array: NDArray[Any], kind: Any) -> Any:
            return array.ctypes.data_as(ctypes.POINTER(kind))

        batch.embd = pointer(self.embeddings, ctypes.c_float)
        batch.pos = pointer(self.positions, self._llama.llama_pos)
        batch.logits = pointer(self.flags, ctypes.c_int8)
        batch.n_seq_id = pointer(self.seq_counts, ctypes.c_int32)
        batch.seq_id = ctypes.cast(self._seq_rows, ctypes.POINTER(ctypes.POINTER(self._llama.llama_seq_id)))

    def set_threads(self, threads: Threads) -> None:
        """Compute with so many from now on."""
        self._llama.llama_set_n_threads(self._context, threads.one, threads.more)

    def chain(self) -> None:
        """All rows of the batch belong to the context's sequence alone."""
        if self._wide:
            self.seq_counts[:] = 1
            self.seq_ids[:, 0] = 0
            self._wide = False

    def tree(self, carried: Sequence[Sequence[int]]) -> None:
        """Row by row, the sequences it belongs to."""
        for index, sequences in enumerate(carried):
            self.seq_counts[index] = len(sequences)
            self.seq_ids[index, : len(sequences)] = sequences
        self._wide = True

    def decode(self, count: int) -> None:
        """Run the first `count` rows of the batch.

        Raises:
            ContextFullError: no K/V cells left; the cache is unchanged.
            EngineError: the engine refused.
        """
        if not 1 <= count <= self._width:
            raise EngineError(f"batch of {count} rows: this lane takes 1 to {self._width}")
        self._batch.n_tokens = count
        if self.output == "callback":
            self.flags[:count] = 1  # without an output row the last layer is cropped away
        status = undisturbed(lambda: self._llama.llama_decode(self._context, self._batch))
        if status == _NO_ROOM:
            raise ContextFullError(f"{self.part.path.name}: no cells left for {count} rows")
        if status != 0:
            raise EngineError(f"{self.part.path.name}: llama_decode gave {status} for {count} rows")

    def hidden(self, count: int) -> FloatArray:
        """Hidden states [count, hidden_size] of the last `decode`, copied."""
        if self._tap is not None:
            return self._tap.rows[:count]
        pointer = self._ext.llama_get_embeddings_nextn(self._context)
        return _copy(pointer, count, self.part.hidden_size)

    def logits(self, count: int) -> FloatArray:
        """Logits [count, vocab_size] of the flagged rows of the last `decode`, copied."""
        return _copy(self._llama.llama_get_logits(self._context), count, self.part.vocab_size)

    def copy_sequence(self, source: int, target: int, start: int, stop: int) -> None:
        """Let positions start … stop-1 of one sequence belong to another as well."""
        self._llama.llama_memory_seq_cp(self._memory, source, target, start, stop)

    def cut_sequence(self, sequence: int, start: int) -> None:
        """Drop a sequence's positions from `start` on."""
        self._llama.llama_memory_seq_rm(self._memory, sequence, start, -1)

    def keep_only_context(self) -> None:
        """Drop every cell and tag that is not sequence 0's."""
        self._llama.llama_memory_seq_keep(self._memory, 0)

    def clear(self) -> None:
        """Forget everything, keeping the memory."""
        self._llama.llama_memory_clear(self._memory, False)

    def close(self) -> None:
        """Free the context. Idempotent."""
        if self._context:
            self._llama.llama_free(self._context)
            self._context = None


class _Tap:
    """Reads the last layer's output out of the graph while llama.cpp computes it (`cb_eval`).

    llama.cpp asks for every node whether we want it; the name comparison is all that is spent on the others.
    """

    def __init__(self, num_layers: int, hidden_size: int) -> None:
        lib = library()
        wanted = f"l_out-{num_layers - 1}".encode()
        name_of, bytes_of, read = (
            lib.ggml_base.ggml_get_name,
            lib.ggml_base.ggml_nbytes,
            lib.ggml_base.ggml_backend_tensor_get,
        )
        self.rows = np.empty((0, hidden_size), np.float32)

        def look(tensor: int, asked: bool, _data: object) -> bool:
            if asked:
                return bool(name_of(tensor) == wanted)
            rows = np.empty((bytes_of(tensor) // FLOAT_BYTES // hidden_size, hidden_size), np.float32)
            read(tensor, rows.ctypes.data, 0, rows.nbytes)
            self.rows = rows
            return True

        self.callback = dict(lib.llama.llama_context_params._fields_)["cb_eval"](look)


def _copy(pointer: Any, rows: int, columns: int) -> FloatArray:
    if not pointer:
        raise EngineError("llama.cpp gave no output for this batch")
    out = np.empty((rows, columns), np.float32)
    ctypes.memmove(out.ctypes.data, pointer, out.nbytes)
    return out
