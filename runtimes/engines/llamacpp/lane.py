"""A lane: one GGUF part with its own llama.cpp context, fed with hidden states through a reused batch."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstone.errors import ContextFullError, EngineError
from skipstone.runtimes.engines.llamacpp.batch import RowBatch
from skipstone.runtimes.engines.llamacpp.kv_types import F16, KV_TYPES, KvType
from skipstone.runtimes.engines.llamacpp.library import NO_DEVICES, library
from skipstone.runtimes.engines.llamacpp.pace import Pace, Paced, Threads
from skipstone.runtimes.engines.llamacpp.watch import Tap, Watch

FloatArray = NDArray[np.float32]
_NO_ROOM = 1
_MANY = 12  # sequences: keeping one is as fast as dropping so many others, each of which is faster than that


@dataclass(frozen=True)
class LaneOptions:
    """How contexts are made.

    Attributes:
        threads: CPU threads of a part, unless it is given others.
        kv: type of K and V.
        max_width: rows per batch.
        max_branches: sequences, i.e. leaves of an uncommitted tree, plus the context's own.
        extra_buffers: repacked weights (AMX, interleaved rows); off where a build's code for them is broken.
        source_length: tokens of an encoder-decoder's source at most; 0: a decoder alone.
        exact: the weights are in float32, and so shall be everything computed with them.
    """

    threads: int
    kv: KvType = KV_TYPES[F16]
    max_width: int = 64
    max_branches: int = 64
    extra_buffers: bool = True
    source_length: int = 0
    exact: bool = False


class Part:
    """The weights of one GGUF file.

    Attributes:
        gpu_layers: of its layers, how many from the last one on lie on a GPU, what follows the layers being one of them.
        threads: that its lanes begin with.
        pace: of all its lanes.
        has_encoder: True of any part of an encoder-decoder.
        has_decoder: False of a segment of an encoder.
    """

    def __init__(self, path: Path, options: LaneOptions, *, gpu_layers: int = 0) -> None:
        lib = library()
        if not path.is_file():
            raise EngineError(f"{path}: no such file", hint="export the bundle again")
        params = lib.llama.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        if gpu_layers == 0:
            params.devices = NO_DEVICES  # else a build for GPUs puts weights where the CPU cannot repack them
        params.use_extra_bufts = options.extra_buffers
        self.path, self.gpu_layers = path, gpu_layers
        self.threads, self.pace = Threads(options.threads, options.threads), Pace()
        self.handle = lib.llama.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise EngineError(f"{path}: llama.cpp cannot load this file", hint="export the bundle again")
        self.has_encoder = bool(lib.llama.llama_model_has_encoder(self.handle))
        self.has_decoder = bool(lib.llama.llama_model_has_decoder(self.handle))
        self.hidden_size = int(lib.llama.llama_model_n_embd(self.handle))
        self.num_layers = int(lib.llama.llama_model_n_layer(self.handle))
        self.vocab_size = int(lib.llama.llama_vocab_n_tokens(lib.llama.llama_model_get_vocab(self.handle)))

    @property
    def head_sizes(self) -> tuple[int, int]:
        """Values of K and of V that a head keeps of one position."""
        usual = self.hidden_size // max(1, library().llama.llama_model_n_head(self.handle))
        return self._fact("attention.key_length", usual), self._fact("attention.value_length", usual)

    @property
    def values_per_position(self) -> int:
        """Values of K and V that all its layers keep of one position."""
        heads = int(library().llama.llama_model_n_head_kv(self.handle))
        return self.num_layers * heads * sum(self.head_sizes)

    def _fact(self, key: str, usual: int) -> int:
        """A number among the file's key-value pairs."""
        llama, text = library().llama, ctypes.create_string_buffer(64)

        def read(name: str) -> str | None:
            length = llama.llama_model_meta_val_str(self.handle, name.encode(), text, len(text))
            return text.value.decode() if length >= 0 else None

        found = read(f"{read('general.architecture')}.{key}")
        return int(found) if found is not None and found.isdigit() else usual

    def close(self) -> None:
        """Free the weights. Idempotent."""
        if self.handle:
            library().llama.llama_model_free(self.handle)
            self.handle = None


class Lane:
    """A context on a part: its K/V, its batch, and one way out for the rows (`nextn`, `callback` or `logits`)."""

    def __init__(self, part: Part, output: str, context_length: int, options: LaneOptions) -> None:
        lib = library()
        self._llama, self._ext = lib.llama, lib.extensions
        self.part, self.output = part, output
        self._tap = Tap(part.hidden_size)
        self._watch = self._watched(options)
        self._context = self._llama.llama_init_from_model(part.handle, self._params(context_length, options))
        if not self._context:
            raise EngineError(
                f"{part.path}: llama.cpp cannot make a context of {context_length} positions",
                hint="pass a smaller --context-length or free memory",
            )
        self._paced = Paced(self._context, part.threads, part.pace)
        if output == "nextn":
            self._ext.llama_set_embeddings_nextn(self._context, True, False)
        self._memory = self._llama.llama_get_memory(self._context)
        self._batch = batch = RowBatch(options.max_width, part.hidden_size, options.max_branches)
        self.embeddings, self.positions, self.flags = batch.embeddings, batch.positions, batch.flags

    def _watched(self, _options: LaneOptions) -> Watch | None:
        """What the graph callback looks for; None: there is no callback."""
        if self.output != "callback":
            return None
        return Watch({f"l_out-{self.part.num_layers - 1}".encode(): self._tap.keep})

    def _params(self, context_length: int, options: LaneOptions) -> Any:
        params = self._llama.llama_context_default_params()
        width = self._context_width(options)
        # llama.cpp aborts on a context smaller than its batch or its number of sequences
        params.n_ctx = max(context_length, width, options.max_branches)
        params.n_batch = params.n_ubatch = width
        params.n_seq_max = options.max_branches
        params.n_threads, params.n_threads_batch = self.part.threads.one, self.part.threads.more
        params.kv_unified = True
        params.flash_attn_type = int(options.kv.is_quantized)
        params.type_k = params.type_v = options.kv.number
        params.no_perf = True
        params.offload_kqv = params.op_offload = self.part.gpu_layers != 0
        if self._watch is not None:
            params.cb_eval = self._watch.callback
        return params

    def _context_width(self, options: LaneOptions) -> int:
        """Rows that the context takes at once."""
        return options.max_width

    def chain(self) -> None:
        """All rows of the batch belong to the context's sequence alone."""
        self._batch.chain()

    def tree(self, carried: Sequence[Sequence[int]]) -> None:
        """Row by row, the sequences it belongs to."""
        self._batch.tree(carried)

    def set_threads(self, threads: Threads) -> None:
        """Compute with so many from now on."""
        self._paced.set_threads(threads)

    def decode(self, count: int) -> None:
        """Run the first `count` rows of the batch.

        Raises:
            ContextFullError: no K/V cells left; the cache is unchanged.
            EngineError: the engine refused.
        """
        if not 1 <= count <= self._batch.width:
            raise EngineError(f"batch of {count} rows: this lane takes 1 to {self._batch.width}")
        self._batch.handle.n_tokens = count
        if self.output == "callback":
            self.flags[:count] = 1  # without an output row the last layer is cropped away
        status = self._paced.run(count, lambda: self._llama.llama_decode(self._context, self._batch.handle))
        if status == _NO_ROOM:
            raise ContextFullError(f"{self.part.path.name}: no cells left for {count} rows")
        if status != 0:
            raise EngineError(f"{self.part.path.name}: llama_decode gave {status} for {count} rows")

    def hidden(self, count: int) -> FloatArray:
        """Hidden states [count, hidden_size] of the last `decode`, copied."""
        if self.output == "callback":
            return self._tap.rows[:count]
        pointer = self._ext.llama_get_embeddings_nextn(self._context)
        return _copy(pointer, count, self.part.hidden_size)

    def logits(self, count: int) -> FloatArray:
        """Logits [count, vocab_size] of the flagged rows of the last `decode`, copied."""
        return _copy(self._llama.llama_get_logits(self._context), count, self.part.vocab_size)

    def embedded(self, count: int) -> FloatArray:
        """What llama.cpp calls embeddings: rows [count, hidden_size] after the final norm, copied."""
        return _copy(self._llama.llama_get_embeddings(self._context), count, self.part.hidden_size)

    def copy_sequence(self, source: int, target: int, start: int, stop: int) -> None:
        """Let positions start … stop-1 of one sequence belong to another as well."""
        self._llama.llama_memory_seq_cp(self._memory, source, target, start, stop)

    def cut_sequence(self, sequence: int, start: int) -> None:
        """Drop a sequence's positions from `start` on."""
        self._llama.llama_memory_seq_rm(self._memory, sequence, start, -1)

    def drop_sequences(self, sequences: Collection[int]) -> None:
        """Drop these, which are all but the context's, with the cells that were theirs alone."""
        if len(sequences) > _MANY:
            self._llama.llama_memory_seq_keep(self._memory, 0)
        else:
            for sequence in sequences:
                self.cut_sequence(sequence, 0)

    def clear(self) -> None:
        """Forget everything, keeping the memory."""
        self._llama.llama_memory_clear(self._memory, False)

    def close(self) -> None:
        """Free the context. Idempotent."""
        if self._context:
            self._llama.llama_free(self._context)
            self._context = None


def _copy(pointer: Any, rows: int, columns: int) -> FloatArray:
    if not pointer:
        raise EngineError("llama.cpp gave no output for this batch")
    out = np.empty((rows, columns), np.float32)
    ctypes.memmove(out.ctypes.data, pointer, out.nbytes)
    return out
