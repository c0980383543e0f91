"""Batches that are fetched ahead, from a file or from the host's memory to an accelerator."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest
import torch

from fairline.data import _fetch
from fairline.data._packed import PackedImages
from tests.conftest import make_data

BATCHES = torch.randperm(50, generator=torch.Generator().manual_seed(0)).split(16)


@pytest.fixture
def packed(tmp_path):
    return make_data(50).pack(tmp_path / "packed")


def test_batches_are_those_of_the_samples_in_order(packed):
    memory = make_data(50)
    order = torch.cat(BATCHES)
    for sizes in (16, [16, 16, 18], 50):
        ours, theirs = list(packed.batches(order, sizes)), list(memory.batches(order, sizes))
        assert [len(index) for index, _ in ours] == [len(index) for index in order.split(sizes)]
        for (index, images), (same_index, same_images) in zip(ours, theirs, strict=True):
            assert torch.equal(index, same_index)
            assert torch.equal(images, same_images)
            assert torch.equal(images, memory.normalized(index))
    assert next(packed.batches(order[:0], 16))[1].shape == (0, 1, 8, 8)


def test_the_next_batch_is_read_while_one_is_used(packed, monkeypatch):
    read, started = PackedImages.read, [threading.Event() for _ in BATCHES]
    calls = iter(started)

    def told(self, index, **options):
        next(calls).set()
        return read(self, index, **options)

    monkeypatch.setattr(PackedImages, "read", told)
    batches = _fetch.fetch(packed.images, BATCHES, torch.device("cpu"))
    for number, images in enumerate(batches):
        assert len(images) == len(BATCHES[number])
        ahead = started[number + 1 : number + 2]
        assert all(event.wait(5) for event in ahead)
        # And not further: two batches are held, whatever there are.
        assert not any(event.is_set() for event in started[number + 2 :])


def test_what_is_wrong_with_a_batch_is_told_when_it_is_asked_for(packed, monkeypatch):
    read = PackedImages.read

    def fails(self, index, **options):
        if torch.equal(index, BATCHES[2]):
            raise OSError("gone")
        return read(self, index, **options)

    monkeypatch.setattr(PackedImages, "read", fails)
    batches = _fetch.fetch(packed.images, BATCHES, torch.device("cpu"))
    next(batches), next(batches)
    with pytest.raises(OSError, match="gone"):
        next(batches)


def test_a_loop_that_stops_early_leaves_no_thread(packed):
    before = threading.active_count()
    batches = _fetch.fetch(packed.images, BATCHES, torch.device("cpu"))
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before


@dataclass
class FakeCuda:
    """What is asked of CUDA, in order, and what is copied; its memory is the host's."""

    said: list[tuple] = field(default_factory=list)
    copies: list[tuple] = field(default_factory=list)
    stream: str = "computing"

    def install(self, monkeypatch, free: int) -> None:
        cuda, empty, to = self, torch.empty, torch.Tensor.to

        class Stream:
            def __init__(self, device=None, name="copying"):
                self.name = name

            def record_event(self):
                return f"copy {len(cuda.copies)}"

            def wait_event(self, event):
                cuda.said.append((self.name, "waits for", event))

        @contextmanager
        def on(stream):
            cuda.stream, before = stream.name, cuda.stream
            yield
            cuda.stream = before

        def pinned(*shape, pin_memory=False, **options):
            tensor = empty(*shape, **options)
            tensor.pinned = pin_memory
            return tensor

        def copied(tensor, *where, **options):
            if where and getattr(where[0], "type", None) == "cuda":
                cuda.copies.append((cuda.stream, getattr(tensor, "pinned", False), options))
                return tensor.clone()
            return to(tensor, *where, **options)

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", on)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(name="computing"))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 40))
        monkeypatch.setattr(torch, "empty", pinned)
        monkeypatch.setattr(torch.Tensor, "to", copied)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: cuda.said.append(("kept", stream.name)))


@pytest.mark.parametrize("where", ["memory", "file"])
def test_batches_come_through_pinned_memory_beside_the_computations(packed, monkeypatch, where):
    images = make_data(50).images
    cuda = FakeCuda()
    cuda.install(monkeypatch, free=0)
    found = _fetch.fetch(images if where == "memory" else packed.images, BATCHES, torch.device("cuda"))
    for number, (index, batch) in enumerate(zip(BATCHES, found, strict=True), start=1):
        assert torch.equal(batch, images[index])
        # Nothing computes with a batch that is still on its way, nor is its memory given away before.
        assert cuda.said[-2:] == [("computing", "waits for", f"copy {number}"), ("kept", "computing")]
    assert cuda.copies == [("copying", True, {"non_blocking": True})] * len(BATCHES)


def test_images_go_to_an_accelerator_whole_only_if_they_fit(packed, monkeypatch):
    data, device = make_data(50), torch.device("cuda")
    size = data.images.numel()
    cuda = FakeCuda()
    cuda.install(monkeypatch, free=4 * size - 1)
    for images in (data.images, packed.images):
        assert _fetch.placed(images, device) is images
    stays = replace(data, mean=(0.5,), std=(0.25,)).to(device)
    assert stays.images is data.images
    # Labels and groups went.
    assert cuda.copies == [("computing", False, {})] * 2
    cuda.install(monkeypatch, free=4 * size)
    assert torch.equal(_fetch.placed(data.images, device), data.images)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, device=None, **options: empty(*shape, **options))
    assert torch.equal(_fetch.placed(packed.images, device), data.images)
