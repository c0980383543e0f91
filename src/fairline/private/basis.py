"""What a cost stands on: a measurement on that very wire, one on loopback with the model's help, or the model."""

from __future__ import annotations

from fairline.private.wire import NETWORKS, Network

PREDICTED = "predicted"


def basis(wire: Network, measured: Network | None = None) -> str | None:
    """Say what a cost over a network stands on.

    Args:
        wire: Between the parties.
        measured: The network, real or emulated, that the same protocol and public graph were measured on, if any.

    Returns:
        Words for tables and sentences; None where that measurement tells nothing of this wire.

    >>> basis(NETWORKS["wan"], NETWORKS["loopback"])
    'loopback measured, WAN added by the model'
    >>> basis(NETWORKS["wan"], NETWORKS["wan"])
    'measured over an emulated WAN'
    >>> basis(NETWORKS["wan"])
    'predicted'
    """
    if measured is None:
        return PREDICTED
    loopback = NETWORKS["loopback"]
    if same_wire(measured, wire):
        return "measured over loopback" if same_wire(wire, loopback) else f"measured over an emulated {spoken(wire)}"
    return f"loopback measured, {spoken(wire)} added by the model" if same_wire(measured, loopback) else None


def same_wire(a: Network, b: Network) -> bool:
    """Whether two networks are one, whatever they are called."""
    return (a.rtt, a.bandwidth) == (b.rtt, b.bandwidth)


def spoken(wire: Network) -> str:
    """A network's name in a sentence.

    Returns:
        The name; an abbreviation in capitals.

    >>> spoken(NETWORKS["lan"]), spoken(Network("100:20", 0.02, 1e8))
    ('LAN', '100:20')
    """
    return wire.name.upper() if wire.name in ("lan", "wan") else wire.name
