"""One party of a private inference, a process of its own: ``python -m fairline.private.party JOB.json``.

The model's owner is given the weights and never the image; the image's owner is given the image and never the weights.
Both know the architecture and the masks. What they say to each other before SPU starts is JSON.

The job file names the role and this party's own files; standard output carries one JSON object a line (progress, what a
call cost, or an error). The process ends when its standard input closes, so that it cannot outlive whoever started it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from fairline._io import load_tensors
from fairline.errors import FairlineError
from fairline.private.graph import Node, PlainGraph
from fairline.private.plan import IMAGE_OWNER, MODEL_OWNER, Plan, graph_digest


class Job(BaseModel):
    """What a party is told when it starts.

    Attributes:
        role: :data:`MODEL_OWNER` or :data:`IMAGE_OWNER`.
        addresses: ``host:port`` of the model's owner and of the image's owner.
        folder: Where SPU's log goes.
        graphs: Public graph file of each network.
        weights: Weight file of each network; the model's owner's alone.
        images: File of normalised images, ``images`` (N, C, H, W); the image's owner's alone.
        plan: What the image's owner asks for; None for the model's owner.
        timeout: Seconds without a word from the other party after which this one gives up.
        connect_timeout: Seconds to wait for the other party to appear.
    """

    model_config = ConfigDict(extra="forbid")

    role: int
    addresses: list[str]
    folder: Path
    graphs: dict[str, Path]
    weights: dict[str, Path] = {}
    images: Path | None = None
    plan: Plan | None = None
    timeout: float = 120
    connect_timeout: float = 60


def say(**message: Any) -> None:
    """A line to whoever started this process."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def give_up(reason: str) -> None:
    """Say why, and end the process whatever its threads do."""
    say(error=reason)
    os._exit(2)


def die_with_parent() -> None:
    """End this process when standard input closes: a thread blocked inside SPU cannot be asked."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            while sys.stdin.buffer.read(4096):
                pass
        os._exit(3)

    threading.Thread(target=watch, daemon=True).start()


def require_free(address: str) -> None:
    """Refuse an address that cannot be listened on.

    Raises:
        FairlineError: The port is busy, or the host is not this one.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise FairlineError(f"'{address}' is not an address of the form host:port.")
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, int(port)))
    except OSError as error:
        raise FairlineError(f"{address} cannot be listened on ({error.strerror or error}).") from None


class Refused(FairlineError):
    """The model's owner does not do what the image's owner asked for; both are told why."""


class Party:
    """A party with its link to the other one."""

    def __init__(self, job: Job) -> None:
        from spu import libspu

        from fairline.private.engine import Engine, compile_graph, log_to

        self.job = job
        self._engine, self._compile = Engine, compile_graph
        self.log = job.folder / f"spu-{job.role}.log"
        log_to(self.log)
        self.graphs = {name: PlainGraph.load_public(path) for name, path in job.graphs.items()}
        for name, path in job.weights.items():
            self.graphs[name].load_weights(path)
        require_free(job.addresses[job.role])
        self._libspu = libspu
        self.link = self._connect()

    def _connect(self) -> Any:
        description = self._libspu.link.Desc()
        description.id = "fairline"
        description.recv_timeout_ms = round(1000 * self.job.timeout)
        description.connect_retry_interval_ms = 200
        description.connect_retry_times = max(1, round(5 * self.job.connect_timeout))
        for rank, address in enumerate(self.job.addresses):
            description.add_party(f"party{rank}", address)
        nobody = (
            f"The {_NAMES[1 - self.job.role]} did not answer at {self.job.addresses[1 - self.job.role]} "
            f"within {self.job.connect_timeout:g} seconds."
        )
        # SPU counts attempts, and one may take long.
        alarm = threading.Timer(self.job.connect_timeout, give_up, [nobody])
        alarm.daemon = True
        alarm.start()
        try:
            return self._libspu.link.create_brpc(description, self.job.role)
        except RuntimeError:
            raise FairlineError(nobody) from None
        finally:
            alarm.cancel()

    def send(self, value: Any) -> None:
        """Tell the other party something that JSON can say."""
        self.link.send(1 - self.job.role, json.dumps(value).encode())

    def receive(self) -> Any:
        """What the other party told.

        Returns:
            What :meth:`send` was given there.

        Raises:
            FairlineError: It is gone, or told something else.
        """
        try:
            return json.loads(self.link.recv(1 - self.job.role))
        except RuntimeError:
            raise FairlineError(f"The {_NAMES[1 - self.job.role]} stopped answering.") from None
        except ValueError:
            raise FairlineError(f"The {_NAMES[1 - self.job.role]} sent something that is not understood.") from None

    def agree(self) -> Plan:
        """Settle the plan: the image's owner proposes, the model's owner checks."""
        if self.job.role == IMAGE_OWNER:
            assert self.job.plan is not None
            self.send(self.job.plan.model_dump())
            answer = self.receive()
            if answer.get("error"):
                raise Refused(str(answer["error"]))
            return self.job.plan
        try:
            plan = Plan.model_validate(self.receive())
            for name, digest in plan.networks.items():
                if name not in self.graphs:
                    raise FairlineError(f"The model's owner has no network '{name}'.")
                if graph_digest(self.graphs[name]) != digest:
                    raise FairlineError(f"The two parties have different architectures or masks of network '{name}'.")
        except (ValidationError, FairlineError) as error:
            sentence = str(error).replace("\n", " ")
            self.send({"error": sentence})
            raise Refused(f"Refused what the image's owner asked for: {sentence}") from None
        self.send({"error": None})
        return plan

    def run(self, plan: Plan) -> None:
        """Take part in a session.

        Says ``setup``, for each protocol its seconds, bytes and messages before the first network, then for each timed
        call ``call``, its row; the image's owner's row holds the logits.
        """
        images = None
        if self.job.images is not None:
            images = load_tensors(self.job.images)[0]["images"].float().numpy()
        calls = plan.calls()
        # One uncounted call of everything, so that no timed one pays for what is made once.
        kinds = list(dict.fromkeys(call[:3] for call in calls))
        warm = [(*kind, 0) for kind in kinds] if plan.warm_up else []
        executables = {
            (name, size): self._compile(self.graphs[name], size)
            for name, size in dict.fromkeys(kind[1:] for kind in kinds)
        }
        protocols = list(dict.fromkeys(kind[0] for kind in kinds))
        done, total = plan.skip, plan.skip + len(calls) + len(warm) + len(protocols)
        setup: dict[str, dict[str, float]] = {}
        engines: dict[str, Any] = {}
        for protocol in protocols:
            say(stage="private inference", done=done, total=total, message=f"{protocol}: setup")
            began = perf_counter()
            engines[protocol] = self._engine.of_plan(self.link.spawn(), protocol, plan, self.log)
            sent, received, messages = self._prime(engines[protocol])
            setup[protocol] = {"seconds": perf_counter() - began, "bytes": sent + received, "messages": messages}
            done += 1
        say(setup=setup)
        current: dict[str, str] = {}
        for place, (protocol, name, size, index) in enumerate([*warm, *calls]):
            say(stage="private inference", done=done, total=total, message=f"{protocol}: {name}, batch of {size}")
            engine = engines[protocol]
            if current.get(protocol) != name:
                self._set_weights(engine, self.graphs[name])
                current[protocol] = name
            row = self._call(engine, executables[name, size], self.graphs[name], size, index, images)
            done += 1
            if place >= len(warm):
                say(call={"protocol": protocol, "network": name, "batch_size": size, "batch": index, **row})

    def _prime(self, engine: Any) -> tuple[int, int, int]:
        """A product and a comparison, so that keys and oblivious transfers are ready: the price of a session."""
        # Large enough that ciphertexts are packed and both threads compare: then all keys are exchanged.
        channels, side = 4, 32
        conv = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}
        shape = (channels, side, side)
        nodes = [
            Node("conv2d", "conv", "conv", ("x",), shape, ("weight", "bias"), options=conv),
            Node("relu", "relu", "relu", ("conv",), shape),
            Node("reshape", "flat", "flat", ("relu",), (channels * side * side,)),
        ]
        tiny = PlainGraph(shape, nodes, {"weight": (channels, channels, 3, 3), "bias": (channels,)}, {}, {})
        tiny.weights = {name: torch.zeros(shape) for name, shape in tiny.shapes.items()}
        self._set_weights(engine, tiny)
        engine.set_private("x", np.zeros((1, *tiny.input_shape), np.float32), IMAGE_OWNER)
        stats = engine.run(self._compile(tiny, 1))
        return stats.sent, stats.received, stats.messages

    def _set_weights(self, engine: Any, graph: PlainGraph) -> None:
        for place, (name, shape) in enumerate(graph.shapes.items()):
            owned = self.job.role == MODEL_OWNER
            value = graph.weights[name].numpy() if owned else np.zeros(shape, np.float32)
            engine.set_private(f"w{place}", value, MODEL_OWNER)

    def _call(
        self,
        engine: Any,
        executable: Any,
        graph: PlainGraph,
        size: int,
        index: int,
        images: np.ndarray[Any, Any] | None,
    ) -> dict[str, Any]:
        batch = np.zeros((size, *graph.input_shape), np.float32)
        count = size
        if images is not None:
            piece = images[index * size : (index + 1) * size]
            batch[: len(piece)] = piece
            count = len(piece)
        began = perf_counter()
        engine.set_private("x", batch, IMAGE_OWNER)
        stats = engine.run(executable)
        logits = None
        # The image's owner alone learns the result: it gets the other share and gives none.
        if self.job.role == MODEL_OWNER:
            packed = pack(engine.output_share())
            engine.link.send_async(IMAGE_OWNER, packed)
        else:
            packed = engine.link.recv(MODEL_OWNER)
            logits = engine.open_output(unpack(packed))[:count].tolist()
        sends = self.job.role == MODEL_OWNER
        return {
            "seconds": perf_counter() - began,
            "engine_seconds": stats.engine_seconds,
            "sent": stats.sent + len(packed) * sends,
            "received": stats.received + len(packed) * (not sends),
            "messages": stats.messages + sends,
            "operators": stats.operators,
            "logits": logits,
        }


_NAMES = {MODEL_OWNER: "model's owner", IMAGE_OWNER: "image's owner"}


def pack(share: tuple[bytes, list[bytes]]) -> bytes:
    """A share as one message: each part behind its length."""
    meta, chunks = share
    return b"".join(len(part).to_bytes(8, "big") + part for part in (meta, *chunks))


def unpack(message: bytes) -> tuple[bytes, list[bytes]]:
    """What :func:`pack` packed.

    Args:
        message: The parts, each behind its length.

    Returns:
        The share.

    Raises:
        FairlineError: The message was cut short.

    >>> unpack(pack((b"meta", [b"one", b"two"])))
    (b'meta', [b'one', b'two'])
    """
    parts, place = [], 0
    while place < len(message):
        size = int.from_bytes(message[place : place + 8], "big")
        parts.append(message[place + 8 : place + 8 + size])
        place += 8 + size
    if place != len(message) or len(parts) < 2:
        raise FairlineError("The model's owner sent a result that is not whole.")
    return parts[0], parts[1:]


def take_part(job: Job) -> None:
    """A whole session, from connecting to the last call."""
    party = Party(job)
    refused = None
    try:
        party.run(party.agree())
    except Refused as error:
        refused = error
    # So that neither closes the link while the other still reads or sends.
    party.send({"done": True})
    party.receive()
    party.link.stop_link()
    if refused is not None:
        raise refused


def main() -> None:
    """Entry point of the process."""
    die_with_parent()
    try:
        job = Job.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
        take_part(job)
    except FairlineError as error:
        give_up(str(error))
    except RuntimeError as error:
        say(error=_explain(str(error), job))
        os._exit(4)
    say(done=True)
    # SPU's threads need not be waited for.
    os._exit(0)


def _explain(text: str, job: Job) -> str:
    """A sentence for an error of SPU's, which carries a stack trace."""
    other = _NAMES[1 - job.role]
    lowered = text.lower()
    if any(word in lowered for word in ("timeout", "timed out", "connect", "send", "recv", "link", "socket")):
        return f"The {other} stopped answering (no word for {job.timeout:g} seconds, or its process ended)."
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("what:")]
    return f"SPU stopped: {lines[0] if lines else 'no reason given'}"


if __name__ == "__main__":
    main()
