"""Which networks go the whole way: a table of the architectures in ``tests/architectures.py``.

Run as ``python benchmarks/architectures.py`` from the root of the repository. Each is masked, trained for an epoch,
linearized (at random, and by SNL), finetuned, audited, exported and run by ONNX Runtime.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.architectures import ARCHITECTURES, STEPS, journey


def main() -> None:
    """Print the table in Markdown."""
    logging.getLogger("fairline").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    print("| network | ReLUs | goes as far as | and then |")
    print("|---|---|---|---|")
    for name, (make, count) in ARCHITECTURES.items():
        with tempfile.TemporaryDirectory() as folder:
            found = journey(make, Path(folder))
        last = list(found.values())[-1]
        works = [step for step in STEPS if found.get(step) == "works"]
        # The list of known operators is long, and the same for all.
        then = "" if last == "works" else last.partition("; known are")[0].rstrip(".") + "."
        relus = "" if count is None else f"{count:,}"
        print(f"| {name} | {relus} | {works[-1] if works else '–'} | {then} |", flush=True)


if __name__ == "__main__":
    main()
