"""Types that llama.cpp keeps K and V in, K and V alike.

A quantised V is only read by flash attention: elsewhere V lies transposed, its blocks across positions. Flash attention
knows no relative positions, which an encoder-decoder's attention adds to its scores, so there K and V are not quantised.
llama.cpp turns quantised K and V by a Hadamard matrix, as queries and results, where heads are as wide as one; this
spreads outliers over a head, and costs no exactness otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

from skipstone.errors import UsageError

F16, F32 = "f16", "f32"


@dataclass(frozen=True)
class KvType:
    """How K and V lie in memory.

    Attributes:
        name: ggml's.
        number: of the type in ggml.
        block: values that are stored together; a head's size must be a multiple.
        block_bytes: that they take.
    """

    name: str
    number: int
    block: int
    block_bytes: int

    @property
    def is_quantized(self) -> bool:
        """Whether values share scales, and flash attention is needed."""
        return self.block > 1

    def num_bytes(self, values: int) -> int:
        """Of so many values, in whole blocks."""
        return -(-values // self.block) * self.block_bytes


# the largest first
KV_TYPES = {
    kind.name: kind
    for kind in (
        KvType(F32, 0, 1, 4),
        KvType(F16, 1, 1, 2),
        KvType("bf16", 30, 1, 2),
        KvType("q8_0", 8, 32, 34),
        KvType("q5_1", 7, 32, 24),
        KvType("q5_0", 6, 32, 22),
        KvType("q4_1", 3, 32, 20),
        KvType("q4_0", 2, 32, 18),
        KvType("iq4_nl", 20, 32, 18),
    )
}


def chosen_kv_type(asked: str | None, scheme: str, *, encodes: bool) -> KvType:
    """The type to keep K and V in.

    Args:
        asked: the user's; None: f32 for f32 bundles, f16 otherwise.
        scheme: the bundle's quantisation.
        encodes: the model is an encoder-decoder.

    Raises:
        UsageError: no such type, or one that this kind of model cannot have.
    """
    name = asked or (F32 if scheme == F32 else F16)
    kind = KV_TYPES.get(name)
    if kind is None:
        raise UsageError(
            f"--kv-type {name}: expected one of {', '.join(KV_TYPES)}",
            hint="leave it out to have the usual one",
        )
    if kind.is_quantized and encodes:
        raise UsageError(
            f"--kv-type {name}: llama.cpp cannot quantise K and V of an encoder-decoder, whose attention adds relative "
            "positions",
            hint=f"use {', '.join(kind.name for kind in KV_TYPES.values() if not kind.is_quantized)}",
        )
    return kind


def check_heads(kind: KvType, head_sizes: tuple[int, int]) -> None:
    """Refuse heads that are no whole blocks.

    Args:
        kind: of K and V.
        head_sizes: values of K and of V that a head keeps of a position.

    Raises:
        UsageError: naming a type that does.
    """
    for what, size in zip("KV", head_sizes, strict=True):
        if size % kind.block:
            raise UsageError(
                f"--kv-type {kind.name}: heads keep {size} values of {what}, a multiple of {kind.block} was expected",
                hint="use f16",
            )
