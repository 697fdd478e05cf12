"""What a recovery is trained on: windows of a text in batches, and which windows are worth it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from skipstone.exporters.compress.work import Progress, Windows

if TYPE_CHECKING:
    from collections.abc import Sequence

_NO_TARGET = -100
_CLUSTERS, _ROUNDS = 16, 20


class Batches(Dataset[dict[str, Tensor]]):
    """As many batches as there are steps, each window as often as any other, in an order drawn anew for every pass.

    A batch is what `DistillationNet` is called with, padded on the right to the longest window of all.
    """

    def __init__(self, text: Windows, *, batch: int, steps: int, seed: int) -> None:
        self._text = text
        self._batch = batch
        self._steps = steps
        generator = torch.Generator().manual_seed(seed)
        passes = -(-batch * steps // len(text.windows))
        orders = [torch.randperm(len(text.windows), generator=generator) for _ in range(passes)]
        self._order: list[int] = torch.cat(orders).tolist() if orders else []

    @property
    def tokens(self) -> float:
        """Predicted tokens of a batch, on average."""
        return self._batch * self._text.tokens / len(self._text.windows)

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        chosen = self._order[index * self._batch : (index + 1) * self._batch]
        windows = [self._text.windows[number] for number in chosen]
        length = max(map(len, self._text.windows)) - 1
        labels = _padded([window[1:] for window in windows], length, _NO_TARGET)
        if self._text.sources is None:
            return {"input_ids": _padded([window[:-1] for window in windows], length, 0), "labels": labels}
        sources = [self._text.sources[number] for number in chosen]
        longest = max(map(len, self._text.sources))
        masks = [torch.ones_like(source) for source in sources]
        return {
            "input_ids": _padded(sources, longest, 0),
            "attention_mask": _padded(masks, longest, 0),
            "labels": labels,
        }


def choose_windows(model: Any, dense: Any, text: Windows, count: int, progress: Progress) -> Windows:
    """The `count` windows that a compressed model has most to learn from, after PASER (https://arxiv.org/abs/2502.12594).

    Windows are clustered by what they are about; a cluster gets its share of the count by how far the model has moved
    from the dense one there (their section 3.3, with KL in place of the Jensen-Shannon divergence, as it is what
    training reduces), and within a cluster those go first where it has moved most.

    Args:
        model: the compressed one.
        dense: what it came from.
        text: to choose from.
        count: windows to choose.
        progress: told of every window.
    """
    harm, topics = _harm(model, dense, text, progress)
    cluster = cluster_rows(topics, min(_CLUSTERS, max(1, len(harm) // 8)))
    means = {c: float(harm[cluster == c].mean()) for c in set(cluster.tolist())}
    chosen: list[int] = []
    for number, mean in means.items():
        members = (cluster == number).nonzero().flatten()
        quota = int(count * mean / max(sum(means.values()), 1e-30))
        chosen += members[harm[members].argsort(descending=True, stable=True)][:quota].tolist()
    rest = [
        index for index in harm.argsort(descending=True, stable=True).tolist() if index not in set(chosen)
    ]
    kept = sorted([*chosen, *rest[: count - len(chosen)]])
    sources = None if text.sources is None else tuple(text.sources[index] for index in kept)
    return Windows(tuple(text.windows[index] for index in kept), sources, text.sha256)


def cluster_rows(rows: Tensor, count: int) -> Tensor:
    """The cluster of every row [n, width], int64 [n]: k-means by cosine, begun with rows far from each other."""
    rows = functional.normalize(rows, dim=1)
    centres = rows[:1]
    while len(centres) < count:
        nearest = (rows @ centres.T).amax(1)
        centres = torch.cat((centres, rows[nearest.argmin()][None]))
    cluster = torch.zeros(len(rows), dtype=torch.int64)
    for _ in range(_ROUNDS):
        cluster = (rows @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, cluster, rows)
        centres = torch.where(sums.any(1, keepdim=True), functional.normalize(sums, dim=1), centres)
    return cluster


@torch.no_grad()
def _harm(model: Any, dense: Any, text: Windows, progress: Progress) -> tuple[Tensor, Tensor]:
    """By window, the mean KL(dense ‖ model) per token [n], and the dense model's mean last hidden state [n, width]."""
    harm, topics = [], []
    for done, inputs in enumerate(text.inputs()):
        progress("choosing windows", done, len(text.windows))
        expected = dense(**inputs, output_hidden_states=True)
        found = model(**inputs).logits[0, :-1].log_softmax(-1)
        target = expected.logits[0, :-1].log_softmax(-1)
        harm.append(functional.kl_div(found, target, log_target=True, reduction="sum") / max(len(found), 1))
        states = expected.decoder_hidden_states if text.sources is not None else expected.hidden_states
        topics.append(states[-1][0].mean(0))
    return torch.stack(harm), torch.stack(topics)


def _padded(rows: Sequence[Tensor], length: int, value: int) -> Tensor:
    """int64 [rows, length], `value` behind the rows' ends."""
    return torch.stack([functional.pad(row, (0, length - len(row)), value=value) for row in rows])
