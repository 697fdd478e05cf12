"""The step that searches, and then has another step carry out what was found."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import nn

from skipstone.errors import ExportError, UsageError
from skipstone.exporters.compress.folder import measure_size
from skipstone.exporters.compress.quantize import quantizer_names
from skipstone.exporters.compress.quantize.step import Quantize
from skipstone.exporters.compress.recipe import options_of
from skipstone.exporters.compress.search import trial
from skipstone.exporters.compress.search.evolution import (
    Candidate,
    Found,
    Schedule,
    Stage,
    evolve,
    smallest,
)
from skipstone.exporters.compress.search.executors import open_executor
from skipstone.exporters.compress.search.levels import Bench, keep_bench
from skipstone.exporters.compress.search.ways import ways_over
from skipstone.exporters.compress.steps import (
    Details,
    Shape,
    Step,
    Target,
    refuse_after_codes,
    refuse_after_factors,
)
from skipstone.exporters.compress.work import Windows, Work
from skipstone.runtimes.user_cache import cache_folder

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(kB|MB|GB|%)")
_SPEED = re.compile(r"(\d+(?:\.\d+)?)x")
_UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
_SAMPLE = 256  # tokens of a sample at most: many short ones say more of a candidate than few long ones


class Search(Step):
    """Find the settings of another step that cost the model least, and take that step.

    Exactly one target is given: a size, a speed, a divergence, or a sparsity.

    Attributes:
        over: `drop`: which layers go; `sparsity`: how much of each layer's weights; `bits`: how each layer is stored.
        target_size: bytes of all weights as they are stored after the step (`6MB`), or in parts of those before (`50%`).
        target_speed: how much faster a token is to be (`2x`), as the cost model has it
            (`skipstone.exporters.compress.search.costs`).
        max_kl: the smallest model whose divergence from the dense one is no more, in nats per token.
        sparsity: share of the layers' weights that goes; with `over="sparsity"` alone.
        method: of the step that is searched for, a pruner's or a quantiser's name.
        scheme: with `over="bits"`, what the checkpoint is to be exported in; it settles the embedding and the head.
        levels: to choose from, shares of weights or layouts (ExecuTorch: schemes); none: a default set.
        curve: a cost curve file to count time by, of a bundle of this very model.
        generations: of the evolution.
        offspring: candidates of each.
        tokens: of the calibration text that candidates are judged on.
        seed: of all that is drawn.
        processes: judge candidates in so many at once; the result is the same.
        ray: address of a Ray cluster to judge them on, or `local`.
    """

    kind: ClassVar[str] = "search"
    over: Literal["drop", "sparsity", "bits"]
    target_size: str | None = None
    target_speed: str | None = None
    max_kl: Annotated[float, Field(gt=0.0)] | None = None
    sparsity: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    method: str | None = None
    scheme: str | None = None
    levels: tuple[str, ...] = ()
    curve: Path | None = None
    generations: Annotated[int, Field(gt=0)] = 30
    offspring: Annotated[int, Field(gt=1)] = 16
    tokens: Annotated[int, Field(ge=_SAMPLE)] = 4096
    seed: int = 0
    processes: Annotated[int, Field(gt=0)] = 1
    ray: str | None = None

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        targets = (self.target_size, self.target_speed, self.max_kl, self.sparsity)
        if sum(target is not None for target in targets) != 1:
            raise ValueError("exactly one of target_size, target_speed, max_kl and sparsity was expected")
        if self.target_size is not None and not _SIZE.fullmatch(self.target_size):
            raise ValueError(f"target_size {self.target_size!r}: a size such as 6MB or 50% was expected")
        if self.target_speed is not None and not _SPEED.fullmatch(self.target_speed):
            raise ValueError(f"target_speed {self.target_speed!r}: a factor such as 2x was expected")
        if self.sparsity is not None and self.over != "sparsity":
            raise ValueError(
                f"sparsity is no target of over = {self.over!r}: give target_size or target_speed"
            )
        if (self.over == "bits") != (self.scheme is not None):
            raise ValueError("scheme belongs to over = 'bits', which needs one, say q4_k_m or 8da4w")
        if self.curve is not None and self.target_speed is None:
            raise ValueError("a curve counts time: give target_speed with it")
        return self

    @property
    def needs_calibration(self) -> bool:
        """Always: candidates are judged on it."""
        return True

    @property
    def counts(self) -> Literal["bytes", "time", "weights"]:
        """What the budget counts."""
        if self.over == "sparsity":
            return "weights"
        return "bytes" if self.target_speed is None else "time"

    def check(self, shape: Shape, target: Target) -> Shape:
        refuse_after_codes(shape, self.kind)
        refuse_after_factors(shape, self.kind)
        if self.over == "sparsity" and (self.target_size or self.target_speed):
            raise UsageError(
                "search: zeros make a model neither smaller nor faster in any format here",
                hint='give sparsity or max_kl, or search over = "drop"',
            )
        if self.over == "bits":
            return self._check_bits(shape, target)
        if self.over == "drop" and target.format == "gguf" and shape.period > 1:
            raise UsageError(
                f"search: in a GGUF, layers of {shape.architecture} can go in groups of {shape.period} alone",
                hint="use drop_layers with layers named, or --format executorch",
            )
        return shape

    def _check_bits(self, shape: Shape, target: Target) -> Shape:
        """As the step checks that will carry the choice out."""
        if self.target_speed is not None:
            raise UsageError(
                "search: no cost model here says how fast layouts are beside each other",
                hint="give target_size: a token takes about as long as reading the weights",
            )
        step = Quantize(scheme=self.scheme, method=self.method or "rtn")
        if step.fold is not None or self.scheme == "int8":
            raise UsageError(
                f"search: {self.method or self.scheme} changes weights of several layers at once",
                hint=f"one of {', '.join(quantizer_names())}, for another scheme than int8",
            )
        return step.check(shape, target)

    def apply(self, model: nn.Module, work: Work) -> Details:
        parent = cache_folder() / "searches"
        parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=parent) as name,
            open_executor(self.processes, self.ray, trial.warm_up) as executor,
        ):
            bench = self._prepare(model, work, Path(name))
            budget = self._budget(bench)
            with _judging(self, bench, name, work, executor) as search:
                bound = self.max_kl
                found = search(budget, ()) if bound is None else smallest(bench.space, bound, search)
        steps = ways_over(self.over).as_step(bench.chosen(found.candidate), self)
        details = [{**options_of(step), "details": dict(step.apply(model, work))} for step in steps]
        return {
            "chosen": details,
            "kl_divergence": found.score,
            "counts": self.counts,
            "cost": found.cost + bench.fixed,
            "budget": None if self.max_kl is not None else budget + bench.fixed,
            "history": list(found.history),
            "evaluations": found.evaluations,
        }

    def _prepare(self, model: Any, work: Work, folder: Path) -> Bench:
        """Everything that candidates are made of and judged by, in a folder."""
        text = _samples(work.calibration.first(self.tokens))
        units, fixed = ways_over(self.over).make_units(model, work, self, folder)
        costs = [unit.levels[-1].cost for unit in units]
        before = measure_size(model, work).num_bytes if self.counts == "bytes" else sum(costs) + fixed
        bench = Bench(units=units, samples=len(text.windows), fixed=fixed, before=before)
        keep_bench(folder, bench, model, work.dense, text)
        return bench

    def _budget(self, bench: Bench) -> float:
        """What the units may cost together."""
        whole = bench.space.cost(bench.space.highest)
        if self.sparsity is not None:
            return whole * (1.0 - self.sparsity)
        if self.target_speed is not None and (match := _SPEED.fullmatch(self.target_speed)):
            return (whole + bench.fixed) / float(match[1]) - bench.fixed
        if self.target_size is not None and (match := _SIZE.fullmatch(self.target_size)):
            size = bench.before / 100 if match[2] == "%" else _UNITS[match[2]]
            return float(match[1]) * size - bench.fixed
        return whole

    def _schedule(self, samples: int) -> Schedule:
        """Children are judged on an eighth of the samples, the best quarter of them on half, as many as there are."""
        few, many = max(1, samples // 8), max(1, samples // 2)
        stages = (Stage(few, max(1, self.offspring // 4)), Stage(many, 1))
        return Schedule(self.generations, self.offspring, stages, samples)


@contextmanager
def _judging(search: Search, bench: Bench, folder: str, work: Work, executor: Executor) -> Iterator[Any]:
    """`evolve` on a bench, ready but for the budget and candidates to start from."""
    schedule = search._schedule(bench.samples)
    judged = 0

    def score(candidates: Sequence[Candidate], samples: Sequence[int]) -> list[float]:
        nonlocal judged
        work.progress("search", judged // search.offspring, 2 * search.generations)
        judged += len(candidates)
        return list(executor.map(trial.divergence, repeat(folder), candidates, repeat(tuple(samples))))

    def run(budget: float, starts: Sequence[Candidate]) -> Found:
        return evolve(bench.space, budget, score, schedule, seed=search.seed, starts=starts)

    try:
        yield run
    except BrokenProcessPool as error:
        raise ExportError(
            f"search: a process of {search.processes} ended early, probably out of memory",
            hint="give fewer processes",
        ) from error
    finally:
        trial.close()


def _samples(text: Windows) -> Windows:
    """The same text in shorter windows, those of an encoder-decoder as they are."""
    if text.sources is not None:
        return text
    pieces = (
        window[start : start + _SAMPLE].clone()
        for window in text.windows
        for start in range(0, len(window), _SAMPLE)
    )
    return Windows(tuple(piece for piece in pieces if len(piece) > 1), None, text.sha256)
