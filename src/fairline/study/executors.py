"""Who runs the cells: processes of this machine, or a Ray cluster."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, Protocol

import torch

from fairline._cores import quota, told_to_children
from fairline.errors import FairlineError
from fairline.ranks import end_with_parent
from fairline.runs import keep_data


class Executor(Protocol):
    """Runs functions elsewhere."""

    @property
    def slots(self) -> int | None:
        """How many run at a time; None where it queues them itself."""
        ...

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Run a function; the future fails with :class:`WorkerLost` where its process was lost."""
        ...

    def close(self) -> None:
        """Stop all that still runs."""
        ...


class WorkerLost(Exception):
    """The process that ran a cell was killed; the cell itself may be sound."""


class Local:
    """Processes of this machine.

    Args:
        jobs: How many.
        threads: Of each, for PyTorch; by default those of this process, shared equally.

    Raises:
        FairlineError: There is not one job.
    """

    def __init__(self, jobs: int = 1, threads: int | None = None) -> None:
        if jobs < 1:
            raise FairlineError(f"A study needs one job at least, not {jobs}.")
        self.slots = jobs
        # PyTorch knows OMP_NUM_THREADS and the affinity, but no quota.
        whole = min(torch.get_num_threads(), quota() or torch.get_num_threads())
        self.threads = threads or max(1, whole // jobs)
        self._pool: ProcessPoolExecutor | None = None

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Run a function in one of the processes."""
        told: Future[Any] = Future()
        for _ in range(2):
            if self._pool is None:
                # Spawned: a forked process inherits the locks of torch's thread pool.
                self._pool = ProcessPoolExecutor(
                    self.slots, mp_context=get_context("spawn"), initializer=prepare, initargs=(self.threads,)
                )
            try:
                # It starts a process where none is idle.
                with told_to_children(self.threads):
                    submitted = self._pool.submit(work, *arguments)
                submitted.add_done_callback(lambda done: _pass_on(done, told))
                return told
            except BrokenProcessPool:
                self._pool.shutdown(wait=False, cancel_futures=True)
                self._pool = None
        raise FairlineError("No process can be started here.")

    def close(self) -> None:
        """Stop the processes."""
        if self._pool is not None:
            # Before the shutdown, which forgets them; one that missed its word to end would be waited for at exit.
            processes = list((self._pool._processes or {}).values())
            self._pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            self._pool = None


class RayCluster:
    """A Ray cluster; each cell is a task with its own share of CPUs and GPUs.

    The workers must see the store under the same path (a shared folder, or a path with a protocol) and have fairline
    installed. Ray starts the task of a lost worker again, elsewhere if need be.

    Args:
        address: As for ``ray.init``: ``auto``, ``ray://HOST:PORT``; ``local`` starts a cluster on this machine.
        cpus: Of each cell.
        gpus: Of each cell; a quarter lets four cells share one.

    Raises:
        FairlineError: Ray is not installed, or the cluster cannot be reached.
    """

    slots: int | None = None

    def __init__(self, address: str = "auto", cpus: float = 1, gpus: float = 0) -> None:
        try:
            import ray
        except ImportError:
            raise FairlineError("A cluster takes the extra: pip install 'fairline[ray]'.") from None
        self._ray = ray
        _require_listening(address)
        self._started = not ray.is_initialized()
        if self._started:
            try:
                ray.init(
                    address=address,
                    include_dashboard=False if address == "local" else None,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
            except (ConnectionError, ValueError, RuntimeError) as error:
                reason = str(error).strip().splitlines()[0].rstrip(".")
                raise FairlineError(f"No Ray cluster at '{address}': {reason}.") from None
        for name, wanted in (("CPU", cpus), ("GPU", gpus)):
            largest = max((node["Resources"].get(name, 0) for node in ray.nodes() if node["Alive"]), default=0)
            if wanted > largest:
                self.close()
                raise FairlineError(
                    f"A cell asks for {wanted:g} {name}s, and no machine of the cluster has more than {largest:g}."
                )
        self._cpus, self._gpus = cpus, gpus

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Run a function as a task."""
        told: Future[Any] = Future()
        remote = self._ray.remote(
            num_cpus=self._cpus, num_gpus=self._gpus, max_retries=3, runtime_env={"env_vars": _passed_on()}
        )(_task)
        done = remote.remote(work, max(1, int(self._cpus)), arguments).future()
        done.add_done_callback(lambda done: _pass_on(done, told, self._ray))
        return told

    def close(self) -> None:
        """Leave the cluster, and end it if it was started here."""
        if self._started:
            self._ray.shutdown()


def _require_listening(address: str) -> None:
    """Refuse an address at which nobody listens; Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise FairlineError(f"No Ray cluster at '{address}': {error.strerror or error}.") from None


def prepare(threads: int) -> None:
    """Make a worker: its threads, data kept between cells, and an end when its parent ends."""
    torch.set_num_threads(threads)
    keep_data()
    end_with_parent()


def _task(work: Callable[..., Any], threads: int, arguments: tuple[Any, ...]) -> Any:
    prepare(threads)
    return work(*arguments)


def _passed_on() -> dict[str, str]:
    """Settings of this process that its workers need; a cluster's own machines may say otherwise."""
    names = ("FAIRLINE_DATA", "FAIRLINE_PRECISION", "FAIRLINE_CUDA_GRAPHS", "FAIRLINE_SCRATCH")
    return {name: os.environ[name] for name in names if name in os.environ}


def _pass_on(done: Future[Any], told: Future[Any], ray: Any = None) -> None:
    if done.cancelled():
        told.cancel()
        return
    error = done.exception()
    if error is None:
        told.set_result(done.result())
        return
    lost: tuple[type[BaseException], ...] = (BrokenProcessPool,)
    if ray is not None:
        lost = (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError)
        error = getattr(error, "cause", None) or error
    told.set_exception(WorkerLost(str(error)) if isinstance(error, lost) else error)
