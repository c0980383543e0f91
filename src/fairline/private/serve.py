"""The two parties on two hosts: the model's owner serves, the image's owner asks.

``fairline.jobs.private.export_network`` writes what each of them needs::

    OUT/public/graph.safetensors   architecture and masks; for both
    OUT/public/images.json         normalisation, size and class names; for both
    OUT/weights.safetensors        stays with the model's owner
    OUT/network.onnx               with weights, for other engines; on request

The two addresses stand in a small YAML file that both have::

    model: 192.0.2.1:9100
    image: 192.0.2.2:9100

Each address must be one that its host can listen on and that the other one reaches. The connection is SPU's own and is
not encrypted by it: run it through a VPN or an SSH tunnel.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from fairline._io import read_json, save_tensors
from fairline.data.decoding import UnusableImage, decode_image, quiet_pillow
from fairline.errors import FairlineError
from fairline.private.graph import PlainGraph
from fairline.private.party import require_free
from fairline.private.plan import IMAGE_OWNER, MODEL_OWNER
from fairline.private.spu import GAVE_UP, PartyProcess, Session, SessionError, make_plan, require_spu, wait_for
from fairline.training import ProgressCallback

#: The network's name in a session of two hosts.
NAME = "network"


class Preprocessing(BaseModel):
    """How an image becomes a network's input, and what its outputs mean.

    Attributes:
        shape: (C, H, W).
        mean: Of each channel, for intensities from 0 to 1.
        std: Likewise.
        class_names: Of the logits.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: tuple[int, ...] = Field(min_length=3, max_length=3)
    mean: tuple[float, ...] = Field(min_length=1)
    std: tuple[float, ...] = Field(min_length=1)
    class_names: tuple[str, ...]


class Addresses(BaseModel):
    """Where the two parties are: ``host:port`` each."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    image: str

    @property
    def by_rank(self) -> list[str]:
        """In the order of the parties' ranks."""
        return [self.model, self.image]


def load_addresses(path: str | Path) -> Addresses:
    """Read the file of addresses.

    Args:
        path: YAML, as in the head of this file.

    Returns:
        Where the parties are.

    Raises:
        FairlineError: It is missing, no YAML, or lacks an address.
    """
    try:
        return Addresses.model_validate(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise FairlineError(f"{path} cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValidationError):
        raise FairlineError(f"{path} does not name two addresses, as in 'model: 192.0.2.1:9100'.") from None


def load_preprocessing(path: Path) -> Preprocessing:
    """Read how images are prepared.

    Args:
        path: ``public/images.json`` of an export.

    Returns:
        What the file says.

    Raises:
        FairlineError: The file is missing or broken.
    """
    try:
        return Preprocessing.model_validate(read_json(path))
    except ValidationError:
        raise FairlineError(f"{path} does not say how images are prepared.") from None


def read_images(paths: Sequence[str | Path], preprocessing: Preprocessing) -> Tensor:
    """Image files as the network takes them, read as the loaders of data sets read them.

    Args:
        paths: The files.
        preprocessing: What the network takes.

    Returns:
        float32, (N, C, H, W).

    Raises:
        FairlineError: A file is missing or no image that can be read.
    """
    channels, height, width = preprocessing.shape
    read = []
    with quiet_pillow():
        for path in paths:
            try:
                pixels = decode_image(Path(path), channels=channels, size=(height, width))
            except UnusableImage as error:
                raise FairlineError(f"{path}: {error}.") from None
            read.append(torch.from_numpy(pixels.transpose(2, 0, 1).copy()))
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return ((torch.stack(read).float() / 255 - mean) / std).contiguous()


def serve(
    folder: str | Path,
    addresses: Addresses,
    *,
    wait: float = 86_400,
    timeout: float = 120,
    progress: ProgressCallback | None = None,
) -> Session:
    """Be the model's owner for one session.

    Args:
        folder: From :func:`fairline.jobs.private.export_network`.
        addresses: Of both parties.
        wait: Seconds to wait for the image's owner.
        timeout: Seconds without a word from it after which the session ends.
        progress: Told of every call.

    Returns:
        What the session cost.

    Raises:
        FairlineError: A file is wrong, or the address is busy.
        SessionError: Nobody came, or the image's owner fell silent.
    """
    require_spu()
    source = Path(folder)
    graph = PlainGraph.load_public(source / "public" / "graph.safetensors")
    graph.load_weights(source / "weights.safetensors")
    require_free(addresses.model)
    session = Session.empty()
    with tempfile.TemporaryDirectory(prefix="fairline-serve-") as temporary:
        job = {
            "role": MODEL_OWNER,
            "addresses": addresses.by_rank,
            "folder": temporary,
            "graphs": {NAME: str((source / "public" / "graph.safetensors").resolve())},
            "weights": {NAME: str((source / "weights.safetensors").resolve())},
            "timeout": timeout,
        }
        began = monotonic()
        while True:
            job["connect_timeout"] = max(1.0, wait - (monotonic() - began))
            with PartyProcess.start(MODEL_OWNER, Path(temporary), job) as party:
                try:
                    wait_for([party], session, progress, quiet=wait + 5 * timeout)
                    return session
                except SessionError:
                    # SPU ends a process that has waited for its timeout before anybody came.
                    waiting = party.process.poll() == GAVE_UP and not session.setup[MODEL_OWNER]
                    if not waiting or monotonic() - began > wait:
                        raise


@dataclass(frozen=True)
class Answer:
    """What the image's owner learns.

    Attributes:
        logits: (N, K).
        class_names: Of the logits.
        seconds: From the images in hand to the logits, without the setup.
        setup_seconds: Keys and first oblivious transfers.
        bytes: Sent by both parties, without the setup.
    """

    logits: Tensor
    class_names: tuple[str, ...]
    seconds: float
    setup_seconds: float
    bytes: float

    @property
    def predictions(self) -> list[str]:
        """Name of the predicted class of each image."""
        return [self.class_names[int(i)] for i in self.logits.argmax(1)]


def query(
    public: str | Path,
    addresses: Addresses,
    images: Sequence[str | Path],
    *,
    protocol: str = "cheetah",
    wait: float = 60,
    timeout: float = 120,
    progress: ProgressCallback | None = None,
) -> Answer:
    """Be the image's owner: ask for the classes of some images.

    Args:
        public: The folder ``public`` of :func:`fairline.jobs.private.export_network`.
        addresses: Of both parties.
        images: Image files; scaled to the network's input.
        protocol: ``"cheetah"`` or ``"semi2k"``.
        wait: Seconds to wait for the model's owner.
        timeout: Seconds without a word from it after which the session ends.
        progress: Told of every call.

    Returns:
        The classes, and what they cost.

    Raises:
        FairlineError: A file is wrong, the address is busy, or the model's owner refused, did not answer or fell
            silent.
    """
    require_spu()
    if not images:
        raise FairlineError("No image was given.")
    source = Path(public)
    graph = PlainGraph.load_public(source / "graph.safetensors")
    preprocessing = load_preprocessing(source / "images.json")
    inputs = read_images(images, preprocessing)
    plan = make_plan({NAME: graph}, inputs, protocols=[protocol], batch_sizes=[len(inputs)], repeats=1, warm_up=False)
    require_free(addresses.image)
    session = Session.empty()
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fairline-query-")))
        save_tensors(temporary / "inputs.safetensors", {"images": inputs})
        job = {
            "role": IMAGE_OWNER,
            "addresses": addresses.by_rank,
            "folder": str(temporary),
            "graphs": {NAME: str((source / "graph.safetensors").resolve())},
            "images": str(temporary / "inputs.safetensors"),
            "plan": plan.model_dump(),
            "timeout": timeout,
            "connect_timeout": wait,
        }
        party = stack.enter_context(PartyProcess.start(IMAGE_OWNER, temporary, job))
        wait_for([party], session, progress, quiet=wait + 5 * timeout)
    (call,) = session.calls[IMAGE_OWNER]
    setup = session.setup[IMAGE_OWNER][protocol]["seconds"]
    sent = call["sent"] + call["received"]
    return Answer(torch.tensor(call["logits"]), preprocessing.class_names, call["seconds"], setup, sent)
