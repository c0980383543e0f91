"""Starting the processes, through Lightning Fabric, and watching them.

Fabric finds the devices, knows what launchers leave in the environment (torchrun, SLURM, MPI, its own), starts
processes and connects them. This process does no work itself where it starts others: it hands on what the first of
them reports, and ends them all when one is lost.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from fairline.errors import FairlineError
from fairline.ranks.alone import become, here
from fairline.ranks.group import Group
from fairline.ranks.lost import RankLost

#: How processes come about: whatever suits; they are there (torchrun, SLURM, ``fabric run``); started from nothing;
#: forked off this one; the same in a notebook.
STRATEGIES = ("auto", "ddp", "ddp_spawn", "ddp_fork", "ddp_notebook")

# They tell of each process that begins or is ended. Set here, where every process comes by.
for _name in ("lightning_fabric.utilities.distributed", "lightning_fabric.utilities.rank_zero"):
    logging.getLogger(_name).setLevel(logging.WARNING)
logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)


def launch(work: Callable[..., Any], *arguments: Any, devices: int = 1, strategy: str = "auto", **settings: Any) -> Any:
    """Do some work on several devices: in as many processes, all of which do it together.

    The work is any function that trains, linearizes, finetunes or audits; what it does comes out as in one process.
    Started from nothing (``ddp_spawn``, the default), processes import the function anew, so a script calls
    ``launch`` under ``if __name__ == "__main__":``. Under torchrun, SLURM or ``fabric run`` (``ddp``) this process
    is one of those that they have started, on each host as many as devices.

    Args:
        work: A function that other processes can import.
        arguments: Its own.
        devices: How many, on each host: GPUs, or processes that share a CPU's cores.
        strategy: One of :data:`STRATEGIES`, as Fabric calls them.
        settings: Its keyword arguments. ``device``, where given, says which kind of device (``"cpu"``, ``"cuda"``);
            ``progress`` is called in this process.

    Returns:
        What the work returned on the first device.

    Raises:
        FairlineError: There are fewer devices, no such strategy, or Fabric is not installed; or what the work raised.

    >>> launch(max, 3, 5)
    5
    """
    if strategy not in STRATEGIES:
        raise FairlineError(
            f"Every device keeps the whole network, so strategies are {', '.join(STRATEGIES)}, not '{strategy}'."
        )
    if devices < 1:
        raise FairlineError(f"Work needs a device at least, not {devices}.")
    if here().size > 1 or (devices == 1 and strategy != "ddp"):
        return work(*arguments, **settings)
    kind = _kind(settings.get("device"))
    _require_devices(kind, devices)
    started = _by_others(kind, devices) if strategy in ("auto", "ddp") else None
    if started is not None:
        return _join(started, work, arguments, settings)
    if strategy == "ddp":
        raise FairlineError(
            "The strategy ddp joins processes that torchrun, SLURM or 'fabric run' has started, and there are none."
        )
    method = {"auto": "spawn", "ddp_notebook": "fork"}.get(strategy, strategy.removeprefix("ddp_"))
    return _supervised(method, kind, devices, work, arguments, settings)


def _kind(device: str | torch.device | None) -> str:
    """``"cuda"`` or ``"cpu"``."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if str(device) not in ("cpu", "cuda"):
        raise FairlineError(f"Several devices are of one kind, cpu or cuda, not '{device}'.")
    return str(device)


def _require_devices(kind: str, devices: int) -> None:
    """Refuse more devices than there are."""
    there, name = (torch.cuda.device_count(), "GPU") if kind == "cuda" else (os.cpu_count() or 1, "CPU core")
    if devices > there:
        raise FairlineError(
            f"{devices} devices were asked for, but there {'is' if there == 1 else 'are'} {there} "
            f"{name}{'' if there == 1 else 's'} here."
        )


def _fabric(kind: str, devices: int, strategy: str, nodes: int = 1) -> Any:
    try:
        from lightning_fabric import Fabric
    except ImportError:
        raise FairlineError("Several devices take the extra: pip install 'fairline[multi]'.") from None
    return Fabric(accelerator=kind, devices=devices, strategy=strategy, num_nodes=nodes)


def _by_others(kind: str, devices: int) -> Any:
    """Fabric in a process that a launcher has started; None where this one is its own."""
    nodes = int(os.environ.get("GROUP_WORLD_SIZE") or os.environ.get("SLURM_NNODES") or 1)
    with _refused():
        fabric = _fabric(kind, devices, "ddp", nodes)
        if not fabric.strategy.cluster_environment.creates_processes_externally:
            return None
        if "LT_CLI_USED" not in os.environ:
            fabric.launch()
    return fabric


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    """Say in a sentence what Fabric does not take."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise FairlineError(f"The processes cannot work together: {reason}.") from None


def _join(fabric: Any, work: Callable[..., Any], arguments: Sequence[Any], settings: Mapping[str, Any]) -> Any:
    """Do the work as one of the ranks."""
    become(Group(fabric.global_rank, fabric.world_size, fabric.device))
    # A process that ends with threads of gloo at work aborts.
    atexit.unregister(_leave)
    atexit.register(_leave)
    if not here().is_first:
        logging.getLogger("fairline").setLevel(logging.CRITICAL)
        settings = {**settings, **({"progress": None} if "progress" in settings else {})}
    return work(*arguments, **settings)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _supervised(
    method: str,
    kind: str,
    devices: int,
    work: Callable[..., Any],
    arguments: Sequence[Any],
    settings: Mapping[str, Any],
) -> Any:
    """Start the processes and wait for what the first one returns."""
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

    fabric = _fabric(kind, devices, f"ddp_{method}")
    pipes = [get_context(method).Pipe(duplex=False) for _ in range(devices)]
    listener = _Listener([reader for reader, _ in pipes], settings.get("progress"))
    writers = [writer for _, writer in pipes]
    told = _pickled(work, arguments, settings, max(1, torch.get_num_threads() // devices))
    before, port = set(active_children()), os.environ.get("MASTER_PORT")
    failure: Exception | None = None
    try:
        fabric.launch(_rank, writers, told)
    except (ProcessExitedException, ProcessRaisedException) as error:
        failure = error
    finally:
        for child in set(active_children()) - before:
            child.kill()
        if port is None:
            # Fabric leaves it there, and would take it again for others.
            os.environ.pop("MASTER_PORT", None)
        for writer in writers:
            writer.close()
        listener.join()
    if failure is not None:
        raise listener.reason(failure, devices) from None
    return listener.result()


def _pickled(work: Callable[..., Any], arguments: Sequence[Any], settings: Mapping[str, Any], threads: int) -> bytes:
    """What each process is told, by value: torch would let them share the tensors of a network."""
    reports = settings.get("progress") is not None
    own = {name: value for name, value in settings.items() if name != "progress" or not reports}
    try:
        return pickle.dumps((work, arguments, own, threads, reports))
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        reason = str(error).rstrip(".")
        raise FairlineError(
            f"What several devices work on is a function that can be imported, with arguments that can be pickled "
            f"({reason})."
        ) from None


def _rank(fabric: Any, writers: Sequence[Connection], told: bytes) -> None:
    """The work, in a process that was started for it."""
    end_with_parent()
    work, arguments, settings, threads, reports = pickle.loads(told)
    torch.set_num_threads(threads)
    writer = writers[fabric.global_rank]

    def tell(kind: str, value: Any) -> None:
        # By value: tensors sent as torch sends them go with the process.
        writer.send_bytes(pickle.dumps((kind, value)))

    if reports:
        settings["progress"] = partial(tell, "progress")
    try:
        result = _join(fabric, work, arguments, settings)
        here().barrier()
    except FairlineError as error:
        tell("error", error)
        sys.exit(2)
    if here().is_first:
        tell("result", result)
    dist.destroy_process_group()


def end_with_parent() -> None:
    """See to it that this process, whatever it waits for, does not outlive the one that started it."""
    parent = parent_process()
    if parent is not None:

        def watch() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


class _Listener(threading.Thread):
    """Hears what the ranks say.

    Args:
        readers: From each rank.
        progress: Told what the first one reports.
    """

    def __init__(self, readers: Sequence[Connection], progress: Callable[[Any], None] | None) -> None:
        super().__init__(daemon=True)
        self.readers = readers
        self.progress = progress
        self.results: list[Any] = []
        self.errors: list[FairlineError] = []
        self.broken: Exception | None = None
        self.start()

    def run(self) -> None:
        """Until all are gone."""
        open_ = list(self.readers)
        while open_:
            for reader in wait(open_):
                assert isinstance(reader, Connection)
                try:
                    kind, value = pickle.loads(reader.recv_bytes())
                except (EOFError, OSError):
                    open_.remove(reader)
                    continue
                {"progress": self._report, "result": self.results.append, "error": self.errors.append}[kind](value)

    def _report(self, update: Any) -> None:
        # A report that fails must not leave the rank waiting for someone to read the next.
        if self.progress is not None and self.broken is None:
            try:
                self.progress(update)
            except Exception as error:
                self.broken = error

    def result(self) -> Any:
        """What the work returned."""
        if self.broken is not None:
            raise self.broken
        return self.results[0]

    def reason(self, failure: Exception, devices: int) -> Exception:
        """Why a process ended: what one has said, else how the system ended one, else its traceback."""
        for error in self.errors:
            if not isinstance(error, RankLost):
                return error
        signal = getattr(failure, "signal_name", None)
        if signal is not None:
            which = getattr(failure, "error_index", 0) + 1
            return RankLost(
                f"Process {which} of {devices} was ended by {signal} (out of memory?), and the others with it; "
                "repeat the command to resume."
            )
        return self.errors[0] if self.errors else failure
