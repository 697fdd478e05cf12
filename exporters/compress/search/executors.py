"""Where candidates are judged: here, in processes, or on a Ray cluster; all by way of `concurrent.futures.Executor`."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from skipstone.errors import UsageError

_Result = TypeVar("_Result")


class HereExecutor(Executor):
    """Runs every call at once, in this process."""

    def submit(self, fn: Callable[..., _Result], /, *args: Any, **kwargs: Any) -> Future[_Result]:
        future: Future[_Result] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class RayExecutor(Executor):
    """Runs every call as a task of a Ray cluster, whose machines must share the folder that the calls read.

    Args:
        address: of the cluster, `auto` for the one that this machine belongs to, or `local` for one made here.
        processes: tasks at once, at most.

    Raises:
        UsageError: Ray is not installed, or no cluster answers.
    """

    def __init__(self, address: str, processes: int) -> None:
        try:
            import ray
        except ImportError as error:
            raise UsageError(
                "search: ray is not installed", hint='install it: pip install "skipstone[cluster]"'
            ) from error
        try:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anyone unasked
            own: dict[str, Any] = (
                {"num_cpus": processes, "include_dashboard": False} if address == "local" else {}
            )
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **own)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UsageError(
                f"search: no Ray cluster at {address!r}: {error}",
                hint="start one with `ray start --head`, or leave out ray",
            ) from error
        self._ray: Any = ray

    def submit(self, fn: Callable[..., _Result], /, *args: Any, **kwargs: Any) -> Future[_Result]:
        task = self._ray.remote(num_cpus=1)(fn)
        return cast("Future[_Result]", task.remote(*args, **kwargs).future())

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._ray.shutdown()


@contextmanager
def open_executor(
    processes: int, ray: str | None = None, warm_up: Callable[[], None] | None = None
) -> Iterator[Executor]:
    """Where calls run.

    Args:
        processes: how many at once; 1: in this process.
        ray: address of a Ray cluster; None: on this machine, without Ray.
        warm_up: called in every process as soon as it is there, while this one goes on: what its module imports is
            loaded when the first call comes. None: nothing is.

    Raises:
        UsageError: see `RayExecutor`.
    """
    if ray is not None:
        executor: Executor = RayExecutor(ray, processes)
    elif processes > 1:
        spawn = multiprocessing.get_context("spawn")
        executor = ProcessPoolExecutor(processes, mp_context=spawn, initializer=warm_up)
        if warm_up is not None:
            for _ in range(processes):
                executor.submit(os.getpid)  # a process starts with the first call that it may take
    else:
        executor = HereExecutor()
    with executor:
        yield executor
