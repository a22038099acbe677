"""Workers of a Ray cluster that share calls: a lost worker's calls are made again, results come in the calls' order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

AHEAD = 4
"""Calls a worker that may be finished before the one that is waited for."""
TRIES = 3
"""Workers that may be lost over one call before it is blamed."""
LOCAL_STORE = 256 * 2**20
"""Bytes of shared memory for a cluster of this machine alone: what passes through it are texts and numbers."""

STARTS = 3
"""Times that such a cluster is started: on a busy machine it may take longer than Ray waits for its own processes."""


class RayPoolError(RuntimeError):
    """Workers that cannot be had or that are lost again and again; the message says what to do."""


@dataclass
class _Task:
    """A call and its place in the order; `lost` counts the workers that died over it."""

    number: int
    arguments: tuple[Any, ...]
    lost: int = field(default=0)


class _Worker:
    """Lives in a worker's process: what `build` makes, made there."""

    def __init__(self, build: Callable[[], Any]) -> None:
        self._build = build
        self._made: Any = None

    def start(self) -> int:
        self._made = self._build()
        return os.getpid()

    def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        return getattr(self._made, method)(*arguments)


class RayPool:
    """`workers` processes, each with an object of its own that `build` makes; calls go to whichever is free.

    `build` is pickled: a function of an importable module, or a `functools.partial` of one. What a call raises is
    raised here, as it was raised there. `lost` counts the workers that died, `pids` are the living ones' processes.
    """

    def __init__(self, build: Callable[[], Any], workers: int, cpus: float = 1, gpus: float = 0,
                 address: str | None = None) -> None:  # fmt: skip
        _connect(address)
        _check_resources(workers, cpus, gpus)
        self._build = build
        self._needs: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus}
        self.lost = self._failed_starts = 0
        self.pids: dict[Any, int] = {}
        self._workers = [self._worker() for _ in range(workers)]
        self._running: dict[Any, tuple[Any, _Task | None]] = {}
        self._idle: list[Any] = []
        for worker in self._workers:
            self._start(worker)

    def call(self, method: str, *arguments: Any) -> Any:
        """One call."""
        return next(iter(self.map(method, [arguments])))

    def map(self, method: str, calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """The results of all calls, in their order, each once. One walk at a time."""
        self._forget()
        waiting = (_Task(number, arguments) for number, arguments in enumerate(calls))
        again: deque[_Task] = deque()
        done: dict[int, Any] = {}
        turn, following = 0, next(waiting, None)
        while again or following or turn in done or any(task for _, task in self._running.values()):
            while self._idle and (again or (following and following.number < turn + AHEAD * len(self._workers))):
                task = again.popleft() if again else following
                assert task
                following = next(waiting, None) if task is following else following
                self._give(self._idle.pop(), method, task)
            if turn not in done:
                task, result = self._next()
                if result is _LOST:
                    again.extend([task] if task else [])
                elif task:
                    done[task.number] = result
            while turn in done:
                yield done.pop(turn)
                turn += 1

    def close(self) -> None:
        """End the workers."""
        import ray

        for worker in self._workers:
            ray.kill(worker)
        self._workers, self._running, self._idle = [], {}, []

    def _worker(self) -> Any:
        import ray

        remote: Any = ray.remote(_Worker)
        return remote.options(**self._needs).remote(self._build)

    def _start(self, worker: Any) -> None:
        self._running[worker.start.remote()] = worker, None

    def _give(self, worker: Any, method: str, task: _Task) -> None:
        self._running[worker.call.remote(method, task.arguments)] = worker, task

    def _next(self) -> tuple[_Task | None, Any]:
        """(task, result) of the next worker that is done; the task is None where it only started."""
        import ray
        from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

        (done, *_), _ = ray.wait(list(self._running), num_returns=1)
        worker, task = self._running.pop(done)
        try:
            result = ray.get(done)
        except (RayActorError, ObjectLostError) as error:
            self._replace(worker, task, error)
            return task, _LOST
        except RayTaskError as error:
            self._idle.append(worker)
            raise error.cause if isinstance(error.cause, Exception) else error from None
        if task is None:
            self.pids[worker], self._failed_starts = result, 0
        self._idle.append(worker)
        return task, result

    def _replace(self, worker: Any, task: _Task | None, error: Exception) -> None:
        """Another worker for a lost one; it gets work when it has started, wherever the cluster finds it room."""
        self.lost += 1
        self.pids.pop(worker, None)
        if task:
            task.lost += 1
        else:
            self._failed_starts += 1
        blamed = task.lost if task else self._failed_starts
        if blamed >= TRIES:
            reason = " ".join(str(error).split())[:300]
            when = "over one call" if task else "as they started"
            raise RayPoolError(f"{blamed} Ray workers died {when} ({reason}); "
                               "look at the cluster's logs: too little memory is the usual cause")  # fmt: skip
        fresh = self._worker()
        self._workers[self._workers.index(worker)] = fresh
        self._start(fresh)

    def _forget(self) -> None:
        """What an abandoned walk left running: its workers are free when they are done with it, its results unread."""
        for worker, task in list(self._running.values()):
            if task:
                self._idle.append(worker)
        self._running = {ref: (worker, task) for ref, (worker, task) in self._running.items() if task is None}


_LOST = object()


def _connect(address: str | None) -> None:
    """Join the cluster at `address`, or one of this machine alone that ends with this process."""
    try:
        import ray
    except ImportError:
        raise RayPoolError("engine.workers needs the ray package: pip install 'sicog-exp[ray]'") from None
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise RayPoolError(f"engine.ray={address}: no Ray cluster answers there ({error}); start it with `ray "
                               "start --head`, or correct the address") from None  # fmt: skip
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for tried in range(STARTS):
        try:
            # named by itself, so that RAY_ADDRESS of the environment is not taken
            ray.init(address="local", include_dashboard=False, object_store_memory=LOCAL_STORE, **quiet)
            return
        except Exception as error:  # Ray raises this class itself where its processes take longer than it waits
            ray.shutdown()
            if tried + 1 == STARTS:
                raise RayPoolError(f"engine.workers: a Ray cluster on this machine did not start ({error}); free some "
                                   "cores and memory, or leave engine.workers out") from error  # fmt: skip


def _check_resources(workers: int, cpus: float, gpus: float) -> None:
    """Workers for which the cluster has no room would be waited for in silence."""
    import ray

    has = ray.cluster_resources()
    for name, needed in (("CPU", workers * cpus), ("GPU", workers * gpus)):
        if has.get(name, 0) < needed:
            raise RayPoolError(f"engine.workers={workers} need {needed:g} {name}s, and the Ray cluster has "
                               f"{has.get(name, 0):g}: lower engine.workers, or add nodes")  # fmt: skip
