"""Networks whose ReLUs are mostly cut, compiled: an equal network that costs what its ReLUs cost.

``compile`` does it all. ``Regions`` cuts a plain graph into blocks, ``planner.plan`` chooses their forms, ``outline``
gives the public half of what comes out, ``build`` the whole. ``PredictedCost`` tells methods that place ReLUs what a
network would cost with other masks.
"""

from fairline.compiler.mask_cost import PredictedCost
from fairline.compiler.network import CompiledNetwork, compile
from fairline.compiler.planner import MEASURES, Terms
from fairline.compiler.regions import FORMS, Block, Plan, Regions, build, outline
from fairline.compiler.size import file_bytes, multiply_adds

__all__ = [
    "FORMS",
    "MEASURES",
    "Block",
    "CompiledNetwork",
    "Plan",
    "PredictedCost",
    "Regions",
    "Terms",
    "build",
    "compile",
    "file_bytes",
    "multiply_adds",
    "outline",
]
