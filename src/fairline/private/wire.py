"""A slower network between the two processes: what a private inference takes over a LAN or a WAN, emulated.

Each party reaches the other through a relay on loopback that holds every piece back by half the round-trip time and
lets through so many bits a second. No privileges are needed, and only these two processes are slowed.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from dataclasses import dataclass
from time import monotonic, sleep

from fairline.errors import FairlineError


@dataclass(frozen=True)
class Network:
    """A network between the parties.

    Attributes:
        name: For tables.
        rtt: Round-trip time in seconds.
        bandwidth: Bits a second, each way.
    """

    name: str
    rtt: float
    bandwidth: float

    def seconds(self, num_bytes: float, one_way_trips: float) -> float:
        """Time that the network adds: the bytes, half of them each way, and the trips that must be waited for."""
        return 8 * (num_bytes / 2) / self.bandwidth + one_way_trips * self.rtt / 2


#: Profiles by name. The LAN and WAN are those of most papers on private inference.
NETWORKS = {
    "loopback": Network("loopback", 0.0, float("inf")),
    "lan": Network("lan", 0.0003, 1e9),
    "wan": Network("wan", 0.04, 1e8),
}


def network(name: str | Network) -> Network:
    """A network between the parties.

    Args:
        name: A profile's, or one of your own as ``"MBITS:MS"``: megabits a second and milliseconds of round trip.

    Returns:
        The network; what already is one, as it is.

    Raises:
        FairlineError: It is neither.

    >>> network("lan")
    Network(name='lan', rtt=0.0003, bandwidth=1000000000.0)
    >>> network("100:40").seconds(25e6, one_way_trips=10)
    1.2
    """
    if isinstance(name, Network):
        return name
    if name in NETWORKS:
        return NETWORKS[name]
    megabits, colon, milliseconds = name.partition(":")
    with contextlib.suppress(ValueError):
        bandwidth, rtt = float(megabits) * 1e6, float(milliseconds) / 1e3
        if colon and bandwidth > 0 and rtt >= 0:
            return Network(name, rtt, bandwidth)
    raise FairlineError(
        f"Network '{name}' is not one of {', '.join(NETWORKS)}, nor MBITS:MS (100:40 is 100 Mb/s and 40 ms)."
    )


class Relay:
    """Passes connections on to an address, slowed down.

    Args:
        target: ``host:port``.
        slow: The network to emulate.

    Attributes:
        address: Where to connect instead of the target.
    """

    def __init__(self, target: str, slow: Network) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._slow = slow
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = [self._listener]
        # One link each way for all connections, as a cable is.
        self._free = {"there": 0.0, "back": 0.0}
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """End all connections."""
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(self._target)
                except OSError:
                    # Nobody listens there yet; the caller tries again.
                    near.close()
                    continue
                for each in (near, far):
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._open += [near, far]
                self._pump(near, far, "there")
                self._pump(far, near, "back")

    def _pump(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        waiting: queue.Queue[tuple[float, bytes]] = queue.Queue()

        def read() -> None:
            with contextlib.suppress(OSError):
                while piece := source.recv(1 << 16):
                    now = monotonic()
                    self._free[way] = max(now, self._free[way]) + 8 * len(piece) / self._slow.bandwidth
                    waiting.put((self._free[way] + self._slow.rtt / 2, piece))
            waiting.put((monotonic() + self._slow.rtt / 2, b""))

        def write() -> None:
            with contextlib.suppress(OSError):
                while True:
                    due, piece = waiting.get()
                    if (left := due - monotonic()) > 0:
                        sleep(left)
                    if not piece:
                        sink.shutdown(socket.SHUT_WR)
                        return
                    sink.sendall(piece)

        for work in (read, write):
            threading.Thread(target=work, daemon=True).start()
