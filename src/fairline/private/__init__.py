"""What private inference of a network costs: predicted, and measured between two real processes.

``to_graph`` exports a network, ``estimate`` predicts its cost on a protocol, ``run`` and ``measure`` run it on SPU
(extra ``fairline[mpc]``), ``agreement`` tells whom fixed-point arithmetic hurts, ``write_onnx`` hands a network to
other engines (extra ``fairline[onnx]``).
"""

from fairline.private.cost import PROTOCOL_COSTS, Cost, Estimate, ProtocolCost, estimate
from fairline.private.export import to_graph
from fairline.private.fixed_point import agreement
from fairline.private.frontier import cheapest, frontier, judge, verdicts
from fairline.private.graph import OPERATORS, Node, PlainGraph
from fairline.private.onnx_graph import write_onnx
from fairline.private.plan import CAVEATS, PROTOCOLS
from fairline.private.spu import Measured, PrivateRun, measure, run
from fairline.private.wire import NETWORKS, Network

__all__ = [
    "CAVEATS",
    "NETWORKS",
    "OPERATORS",
    "PROTOCOLS",
    "PROTOCOL_COSTS",
    "Cost",
    "Estimate",
    "Measured",
    "Network",
    "Node",
    "PlainGraph",
    "PrivateRun",
    "ProtocolCost",
    "agreement",
    "cheapest",
    "estimate",
    "frontier",
    "judge",
    "measure",
    "run",
    "to_graph",
    "verdicts",
    "write_onnx",
]
