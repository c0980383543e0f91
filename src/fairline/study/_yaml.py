"""YAML as people write it: of PyYAML's notations of YAML 1.1 those that surprise are left out."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

_BOOL, _INT, _FLOAT, _TEXT = (f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "str"))


class Loader(yaml.SafeLoader):
    """As PyYAML's, but ``1e-3`` is a number, ``010`` is ten, ``1:30`` and dates are text, and so is every key.

    PyYAML by itself reads an option called ``on`` as true. Values that are yes, no, on or off stay truth values.
    """

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, scalar) for tag, scalar in known if tag.rpartition(":")[2] in ("bool", "null", "merge")]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """A mapping whose keys are no truth values."""
        node = super().compose_mapping_node(anchor)
        for key, _ in node.value:
            if key.tag == _BOOL:
                key.tag = _TEXT
        return node


for _kind, _scalar, _starts in (
    (_INT, r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+|0b[01]+", "-+0123456789"),
    (_FLOAT, r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    (_FLOAT, r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
):
    Loader.add_implicit_resolver(_kind, re.compile(f"^(?:{_scalar})$"), list(_starts))


def _whole(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 0 if text[1:2].isalpha() else 10)


Loader.add_constructor(_INT, _whole)


def read(text: str) -> tuple[Any, yaml.Node | None]:
    """What a text says, and its nodes, which know their lines.

    Args:
        text: YAML.

    Returns:
        The content, and the root of the nodes; None of an empty text.

    Raises:
        ValueError: It cannot be read; the message is the reason, not a sentence.
    """
    try:
        tree = yaml.compose(text, Loader=Loader)
        return yaml.load(text, Loader=Loader), tree
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except (ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
        # Of a value that is none of the kind that a tag says.
        raise ValueError(f"a value is not of its kind: {error}") from None


__all__ = ["Loader", "read"]
