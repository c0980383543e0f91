"""A real two-party private inference: two processes, SPU between them.

:func:`run` measures one network, :func:`measure` several on several protocols. Each starts two processes that talk over
loopback: one is given the weights, the other the images, and neither the other's files.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from fairline._io import read_json, save_tensors, write_json, write_text
from fairline.errors import FairlineError
from fairline.private.export import to_graph
from fairline.private.graph import PlainGraph
from fairline.private.plan import CAVEATS, IMAGE_OWNER, MODEL_OWNER, PROTOCOLS, Plan, graph_digest
from fairline.private.wire import NETWORKS, Network, Relay
from fairline.private.wire import network as find_network
from fairline.training import Progress, ProgressCallback

#: Columns of the table of measurements.
COLUMNS = (
    "network",
    "protocol",
    "batch_size",
    "relus",
    "seconds",
    "seconds_low",
    "seconds_high",
    "calls",
    "bytes",
    "rounds",
    "engine_share",
    "setup_seconds",
    "setup_bytes",
    "max_abs_error",
    "agreement",
)


@dataclass(frozen=True)
class PrivateRun:
    """One network, measured on one protocol.

    Attributes:
        protocol: ``"cheetah"`` or ``"semi2k"``.
        seconds: Median wall time of a call, from the image in hand to the logits.
        setup_seconds: Before the first call: connection, keys, first oblivious transfers. Once a session.
        bytes: Sent by both parties in a call that makes no new oblivious transfers.
        setup_bytes: Sent by both before the first call.
        rounds: Messages that the busier party sends in such a call: an upper bound of the trips that are waited for.
        max_abs_error: Largest difference from the plain logits.
        agreement: Share of images whose predicted class is the plain network's.
        engine_share: Of the wall time, spent inside SPU.
        outputs: Logits, (N, K), as the image's owner saw them.
        caveat: What this protocol does and does not protect.
        table: A row for each batch size; columns as :data:`COLUMNS`.
        operators: Seconds, bytes and messages by SPU operator of the median call's batch size.
    """

    protocol: str
    seconds: float
    setup_seconds: float
    bytes: float
    setup_bytes: float
    rounds: float
    max_abs_error: float
    agreement: float
    engine_share: float
    outputs: Tensor
    caveat: str
    table: pd.DataFrame
    operators: pd.DataFrame

    def __str__(self) -> str:
        return (
            f"{self.protocol}: {self.seconds:.2f} s, {self.bytes / 1e6:.2f} MB, {self.rounds:.0f} rounds a call "
            f"(setup {self.setup_seconds:.2f} s, {self.setup_bytes / 1e6:.2f} MB); "
            f"largest error {self.max_abs_error:.1e}. {self.caveat}"
        )


def run(
    model: nn.Module | PlainGraph,
    images: Tensor,
    *,
    protocol: str = "cheetah",
    repeats: int = 3,
    ring_bits: int = 64,
    fraction_bits: int = 18,
    network: str | Network = "loopback",
    timeout: float = 120,
    progress: ProgressCallback | None = None,
) -> PrivateRun:
    """Run one network between two processes.

    Args:
        model: The network, (B, C, H, W) to (B, K), or its plain graph.
        images: Normalised, (N, C, H, W), as :meth:`~fairline.GroupedData.normalized` gives them; all in one batch.
        protocol: ``"cheetah"`` (two parties, no dealer) or ``"semi2k"`` (faster, trusts a dealer).
        repeats: Timed calls, after one that is not timed.
        ring_bits: Of the ring Z/2ᵏ: 64 or 128.
        fraction_bits: Of the fixed-point form.
        network: Emulated between the processes: ``"loopback"``, ``"lan"``, ``"wan"`` or ``"MBITS:MS"``.
        timeout: Seconds without a word between the parties after which the run fails.
        progress: Told of every call.

    Returns:
        What the calls cost and gave.

    Raises:
        FairlineError: SPU is missing, the input is wrong, or a party failed.
    """
    measured = measure(
        {"network": model},
        images,
        protocols=[protocol],
        batch_sizes=[len(images)],
        repeats=repeats,
        ring_bits=ring_bits,
        fraction_bits=fraction_bits,
        network=network,
        timeout=timeout,
        progress=progress,
    )
    row = measured.table.iloc[0]
    operators = measured.operators.drop(columns=["network", "protocol", "batch_size"])
    return PrivateRun(
        protocol=protocol,
        seconds=row["seconds"],
        setup_seconds=row["setup_seconds"],
        bytes=row["bytes"],
        setup_bytes=row["setup_bytes"],
        rounds=row["rounds"],
        max_abs_error=row["max_abs_error"],
        agreement=row["agreement"],
        engine_share=row["engine_share"],
        outputs=measured.outputs[protocol, "network", len(images)],
        caveat=CAVEATS[protocol],
        table=measured.table,
        operators=operators,
    )


@dataclass(frozen=True)
class Measured:
    """Several networks, measured in one session.

    Attributes:
        table: A row for each network, protocol and batch size; columns as :data:`COLUMNS`. ``seconds_low`` and
            ``seconds_high`` are the fastest and slowest call.
        outputs: Logits (N, K) by protocol, network and batch size.
        operators: A row for each SPU operator: seconds, bytes and messages in a call.
        calls: A row for each timed call.
    """

    table: pd.DataFrame
    outputs: dict[tuple[str, str, int], Tensor]
    operators: pd.DataFrame
    calls: pd.DataFrame


def measure(
    models: Mapping[str, nn.Module | PlainGraph],
    images: Tensor,
    *,
    protocols: Sequence[str] = PROTOCOLS,
    batch_sizes: Sequence[int] = (1,),
    repeats: int = 3,
    ring_bits: int = 64,
    fraction_bits: int = 18,
    seed: int = 0,
    network: str | Network = "loopback",
    timeout: float = 120,
    checkpoint: Path | None = None,
    progress: ProgressCallback | None = None,
) -> Measured:
    """Run several networks between two processes, their calls in random order.

    Args:
        models: Networks, or their plain graphs, by name.
        images: Normalised, (N, C, H, W); each network sees all of them, in batches.
        protocols: One session serves all.
        batch_sizes: Each is compiled once for each network.
        repeats: Timed calls of each batch.
        ring_bits: As for :func:`run`.
        fraction_bits: Likewise.
        seed: Of the order of the calls.
        network: As for :func:`run`.
        timeout: As for :func:`run`.
        checkpoint: File that an interrupted measurement resumes from, at the next call.
        progress: Told of every call.

    Returns:
        What the calls cost and gave, by network, protocol and batch size.

    Raises:
        FairlineError: SPU is missing, the input is wrong, or a party failed.
    """
    require_spu()
    images = checked_images(images)
    chosen = find_network(network)
    graphs = {name: m if isinstance(m, PlainGraph) else to_graph(m, images[:1]) for name, m in models.items()}
    plan = make_plan(
        graphs,
        images,
        protocols=list(protocols),
        batch_sizes=[int(size) for size in batch_sizes],
        repeats=repeats,
        ring_bits=ring_bits,
        fraction_bits=fraction_bits,
        seed=seed,
    )
    with tempfile.TemporaryDirectory(prefix="fairline-private-") as temporary:
        folder = Path(temporary)
        session = two_processes(
            folder, graphs, images, plan, slow=chosen, timeout=timeout, checkpoint=checkpoint, progress=progress
        )
    with torch.inference_mode():
        plain = {name: graph(images) for name, graph in graphs.items()}
    return summarise(plan, graphs, plain, session)


def require_spu() -> None:
    """Refuse to go on without SPU.

    Raises:
        FairlineError: It is not installed.
    """
    if importlib.util.find_spec("spu") is None:
        raise FairlineError("Private inference takes the extra: pip install 'fairline[mpc]' (Python 3.11).")


def checked_images(images: Tensor) -> Tensor:
    """Images as a network takes them.

    Args:
        images: Normalised, (N, C, H, W).

    Returns:
        float32, contiguous, on the CPU.

    Raises:
        FairlineError: They are raw, none, or not (N, C, H, W).
    """
    if not images.is_floating_point():
        raise FairlineError(
            f"Private inference takes normalised images, not {images.dtype}; use data.normalized(index)."
        )
    if images.ndim != 4 or not len(images):
        raise FairlineError(f"Private inference takes images (N, C, H, W), not {tuple(images.shape)}.")
    return images.detach().cpu().float().contiguous()


def make_plan(graphs: Mapping[str, PlainGraph], images: Tensor, **options: Any) -> Plan:
    """The session to propose.

    Args:
        graphs: By name.
        images: Normalised, (N, C, H, W).
        options: Fields of :class:`Plan`.

    Returns:
        The plan, checked.

    Raises:
        FairlineError: An option or the images do not fit.
    """
    for name, graph in graphs.items():
        if tuple(images.shape[1:]) != graph.input_shape:
            raise FairlineError(
                f"The images have shape {tuple(images.shape[1:])}, but network '{name}' takes {graph.input_shape}."
            )
    check_options(**{key: value for key, value in options.items() if key in CHECKED})
    networks = {name: graph_digest(graph) for name, graph in graphs.items()}
    return Plan(networks=networks, images=len(images), **options)


#: Options that :func:`check_options` checks.
CHECKED = ("protocols", "batch_sizes", "repeats", "ring_bits", "fraction_bits")


def check_options(
    *,
    protocols: Sequence[str] = PROTOCOLS,
    batch_sizes: Sequence[int] = (1,),
    repeats: int = 1,
    ring_bits: int = 64,
    fraction_bits: int = 18,
) -> None:
    """Refuse what no session can do.

    Raises:
        FairlineError: A protocol is unknown, a number is too small, or the bits do not fit.
    """
    unknown = [name for name in protocols if name not in PROTOCOLS]
    if unknown or not protocols:
        raise FairlineError(
            f"There is no protocol '{''.join(unknown[:1])}' to run; known are {' and '.join(PROTOCOLS)}."
        )
    if not batch_sizes or any(size < 1 for size in batch_sizes):
        raise FairlineError("A batch holds at least one image.")
    if repeats < 1:
        raise FairlineError(f"A measurement needs one timed call at least, not {repeats}.")
    require_bits(ring_bits, fraction_bits)


def require_bits(ring_bits: int, fraction_bits: int) -> None:
    """Refuse bit widths that no product fits into.

    Raises:
        FairlineError: They do not fit.
    """
    if ring_bits not in (64, 128):
        raise FairlineError(f"A ring has 64 or 128 bits, not {ring_bits} (SPU 0.9.5 crashes with 32).")
    # A product has twice the fraction before it is truncated, and needs some bits before the point.
    if not fraction_bits >= 1 or 2 * fraction_bits + 4 > ring_bits:
        raise FairlineError(
            f"{fraction_bits} fraction bits do not fit into a ring of {ring_bits}: a product needs twice as many, "
            f"and some before the point; at most {ring_bits // 2 - 2} do."
        )


#: Exit code of a process whose link SPU has given up.
GAVE_UP = 255


class SessionError(FairlineError):
    """A session that had begun failed: a party ended, refused or fell silent."""


@dataclass
class Session:
    """What the parties of a session measured, filled as they say it.

    Attributes:
        setup: By rank and protocol: seconds, bytes and messages before the first network.
        calls: By rank: a row for each timed call, in the order of the plan.
    """

    setup: dict[int, dict[str, dict[str, float]]]
    calls: dict[int, list[dict[str, Any]]]

    @classmethod
    def empty(cls) -> Session:
        """Nothing measured yet."""
        return cls({MODEL_OWNER: {}, IMAGE_OWNER: {}}, {MODEL_OWNER: [], IMAGE_OWNER: []})

    @classmethod
    def resume(cls, path: Path | None, plan: Plan) -> Session:
        """What an interrupted session of the same plan left in its file, if any."""
        if path is None or not path.exists():
            return cls.empty()
        content = read_json(path)
        if content.get("plan") != plan.model_dump():
            return cls.empty()
        return cls(*({int(rank): value for rank, value in content[key].items()} for key in ("setup", "calls")))

    @property
    def done(self) -> int:
        """Calls that both parties have told of."""
        return min(map(len, self.calls.values()))

    def save(self, path: Path, plan: Plan) -> None:
        """Keep the calls that both have told of."""
        calls = {rank: rows[: self.done] for rank, rows in self.calls.items()}
        write_json(path, {"plan": plan.model_dump(), "setup": self.setup, "calls": calls})


def two_processes(
    folder: Path,
    graphs: Mapping[str, PlainGraph],
    images: Tensor,
    plan: Plan,
    *,
    slow: Network = NETWORKS["loopback"],
    timeout: float = 120,
    checkpoint: Path | None = None,
    progress: ProgressCallback | None = None,
) -> Session:
    """Start both parties, wait for both.

    Args:
        folder: Empty; each party gets a folder in it, readable by this user alone.
        graphs: With weights.
        images: Normalised.
        plan: From :func:`make_plan`.
        slow: The network to emulate between them.
        timeout: Seconds without a word between the parties.
        checkpoint: File that the session resumes from.
        progress: Told of every call.

    Returns:
        What the parties said of all calls.

    Raises:
        FairlineError: A party failed; by then the other one has ended too.
    """
    session = Session.resume(checkpoint, plan)
    left = plan.model_copy(update={"skip": session.done})
    if not left.calls():
        return session
    jobs = _write_jobs(folder, graphs, images, left, timeout)

    def saved() -> None:
        if checkpoint is not None:
            session.save(checkpoint, plan)

    with contextlib.ExitStack() as stack:
        if slow.rtt or slow.bandwidth != float("inf"):
            for rank, job in jobs.items():
                relay = stack.enter_context(contextlib.closing(Relay(job["addresses"][1 - rank], slow)))
                job["addresses"][1 - rank] = relay.address
        parties = [
            stack.enter_context(PartyProcess.start(rank, Path(job["folder"]), job, share=len(jobs)))
            for rank, job in jobs.items()
        ]
        wait_for(parties, session, progress, quiet=5 * timeout, saved=saved)
    return session


def _write_jobs(
    folder: Path, graphs: Mapping[str, PlainGraph], images: Tensor, plan: Plan, timeout: float
) -> dict[int, dict[str, Any]]:
    """Put each party's own files into a folder of its own; returns what each is told, by rank."""
    addresses = free_addresses()
    numbered = {name: f"{place}.safetensors" for place, name in enumerate(graphs)}
    jobs: dict[int, dict[str, Any]] = {}
    for rank, name in ((MODEL_OWNER, "model"), (IMAGE_OWNER, "image")):
        own = folder / name
        own.mkdir(mode=0o700)
        jobs[rank] = {"role": rank, "addresses": list(addresses), "folder": str(own), "timeout": timeout}
        jobs[rank]["graphs"] = {network: str(own / f"public-{file}") for network, file in numbered.items()}
        for network, file in jobs[rank]["graphs"].items():
            graphs[network].save_public(file)
    owner, asker = jobs[MODEL_OWNER], jobs[IMAGE_OWNER]
    owner["weights"] = {network: str(folder / "model" / f"weights-{file}") for network, file in numbered.items()}
    for network, file in owner["weights"].items():
        graphs[network].save_weights(file)
    asker["images"] = str(folder / "image" / "images.safetensors")
    save_tensors(asker["images"], {"images": images})
    asker["plan"] = plan.model_dump()
    return jobs


def free_addresses() -> list[str]:
    """Two addresses on loopback that nothing listens on."""
    with socket.socket() as first, socket.socket() as second:
        for each in (first, second):
            each.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{each.getsockname()[1]}" for each in (first, second)]


class PartyProcess:
    """A running party, with the lines it says."""

    def __init__(self, rank: int, process: subprocess.Popen[str], errors: Path) -> None:
        self.rank = rank
        self.process = process
        self.errors = errors
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    @classmethod
    @contextlib.contextmanager
    def start(cls, rank: int, folder: Path, job: Mapping[str, Any], share: int = 1) -> Iterator[PartyProcess]:
        """Start the process; it is gone when the block ends.

        Args:
            rank: Which party.
            folder: Its own.
            job: What it is told.
            share: Parties among which this machine's cores are divided.

        Yields:
            The running party.
        """
        write_text(folder / "job.json", json.dumps(job))
        errors = folder / "stderr.txt"
        with errors.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "fairline.private.party", str(folder / "job.json")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={
                    # SPU multiplies matrices in four threads wherever it runs; more than there are cores wait for
                    # each other ten times longer than they compute.
                    "OMP_THREAD_LIMIT": str(max(1, (os.cpu_count() or 1) // share)),
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    "JAX_PLATFORMS": "cpu",
                },
            )
        party = cls(rank, process, errors)
        try:
            yield party
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    assert pipe is not None
                    pipe.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError):
            for line in self.process.stdout:
                self.lines.put(line)
        self.lines.put(None)

    def failure(self) -> str:
        """Why the process ended, where it said nothing itself."""
        code = self.process.wait()
        name = f"The process that holds the {'weights' if self.rank == MODEL_OWNER else 'images'}"
        if code == GAVE_UP:
            other = "image" if self.rank == MODEL_OWNER else "model"
            return f"The {other}'s owner stopped answering, and SPU gave the link up."
        if code < 0:
            return f"{name} was ended by {signal.Signals(-code).name}."
        last = [line for line in self.errors.read_text(errors="replace").splitlines() if line.strip()][-1:]
        return f"{name} ended with code {code}" + (f": {last[0].strip()}." if last else ".")


def wait_for(
    parties: Sequence[PartyProcess],
    session: Session,
    progress: ProgressCallback | None = None,
    *,
    quiet: float,
    saved: Callable[[], None] = lambda: None,
) -> None:
    """Until all parties are done.

    Args:
        parties: Running.
        session: Filled with what they say.
        progress: Told what the last of them has done.
        quiet: Seconds that they may all say nothing.
        saved: Called after every call that all have told of.

    Raises:
        SessionError: One failed, or all fell silent.
    """
    waiting = set(parties)
    heard = monotonic()
    while waiting:
        for party in list(waiting):
            try:
                line = party.lines.get(timeout=0.05)
            except queue.Empty:
                continue
            heard = monotonic()
            if line is None:
                raise SessionError(party.failure())
            try:
                said = json.loads(line)
            except ValueError:
                continue
            if not isinstance(said, dict):
                continue
            if "error" in said:
                # If the other one was killed, that is the cause, and this its consequence.
                killed = [other for other in waiting - {party} if (other.process.poll() or 0) < 0]
                raise SessionError(killed[0].failure() if killed else str(said["error"]))
            if said.get("done") is True:
                waiting.discard(party)
            elif "setup" in said:
                session.setup[party.rank] = {**said["setup"], **session.setup[party.rank]}
            elif "call" in said:
                before = session.done
                session.calls[party.rank].append(said["call"])
                if session.done > before:
                    saved()
            elif progress is not None and "stage" in said and party is parties[-1]:
                progress(Progress(said["stage"], said["done"], said["total"], said["message"]))
        if monotonic() - heard > quiet:
            raise SessionError(f"The parties of the private inference said nothing for {quiet:g} seconds.")


def summarise(plan: Plan, graphs: Mapping[str, PlainGraph], plain: Mapping[str, Tensor], session: Session) -> Measured:
    """Tables from what the parties of a whole session said; ``plain`` holds each network's plain logits (N, K)."""
    keys = ["network", "protocol", "batch_size"]
    mine, theirs = session.calls[IMAGE_OWNER], session.calls[MODEL_OWNER]
    calls = pd.DataFrame([{k: v for k, v in row.items() if k not in ("operators", "logits")} for row in mine])
    # What one received, the other sent.
    calls["bytes"] = calls["sent"] + calls["received"]
    calls["messages"] = [max(a["messages"], b["messages"]) for a, b in zip(mine, theirs, strict=True)]
    calls["engine_share"] = calls["engine_seconds"] / calls["seconds"]
    outputs: dict[tuple[str, str, int], Tensor] = {
        (protocol, name, size): torch.full((plan.images, graphs[name].outputs), torch.nan)
        for name in plan.networks
        for protocol in plan.protocols
        for size in plan.batch_sizes
    }
    operators = []
    for row in mine:
        start = row["batch"] * row["batch_size"]
        logits = torch.tensor(row["logits"])
        outputs[row["protocol"], row["network"], row["batch_size"]][start : start + len(logits)] = logits
        for operator, (seconds, sent, received, messages) in row["operators"].items():
            operators.append([*(row[key] for key in keys), operator, seconds, sent + received, messages])
    rows = []
    for (protocol, name, size), logits in outputs.items():
        part = calls[(calls["protocol"] == protocol) & (calls["network"] == name) & (calls["batch_size"] == size)]
        setup = session.setup[IMAGE_OWNER][protocol]
        rows.append(
            {
                "network": name,
                "protocol": protocol,
                "batch_size": size,
                "relus": graphs[name].relus,
                "seconds": part["seconds"].median(),
                "seconds_low": part["seconds"].min(),
                "seconds_high": part["seconds"].max(),
                "calls": len(part),
                # Those of a call that makes no new oblivious transfers; else they are the same every time.
                "bytes": part["bytes"].min(),
                "rounds": part["messages"].min(),
                "engine_share": part["engine_share"].median(),
                "setup_seconds": setup["seconds"],
                "setup_bytes": setup["bytes"],
                "max_abs_error": float((logits - plain[name]).abs().max()),
                "agreement": float((logits.argmax(1) == plain[name].argmax(1)).double().mean()),
            }
        )
    by_operator = pd.DataFrame(operators, columns=[*keys, "operator", "seconds", "bytes", "messages"])
    return Measured(
        table=pd.DataFrame(rows, columns=list(COLUMNS)),
        outputs=outputs,
        operators=by_operator.groupby([*keys, "operator"], sort=False).median().reset_index(),
        calls=calls,
    )
