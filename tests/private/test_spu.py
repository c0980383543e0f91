"""Real runs between two processes. Skipped where SPU is not installed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fairline._io import save_tensors
from fairline.errors import FairlineError
from fairline.models import build
from fairline.private import Network, agreement, estimate, measure, run, to_graph
from fairline.private.plan import IMAGE_OWNER, MODEL_OWNER, Plan, graph_digest
from fairline.private.spu import PartyProcess, Session, SessionError, free_addresses, make_plan, two_processes, wait_for
from tests.conftest import make_data
from tests.private.networks import Everything, masked, settle
from tests.reference.private import fixed_point_linear

spu = pytest.mark.skipif(importlib.util.find_spec("spu") is None, reason="SPU is not installed")

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def small(share: float = 0.3, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return masked(settle(build("cnn", 4, 3, 8, width=4)), IMAGES, share)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where the parties that a test starts have their files, which tells them from those of other tests."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def parties_of(folder: Path) -> list[int]:
    """Running processes of parties whose files are in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            # A process that has ended and waits to be reaped has no words.
            words = (process / "cmdline").read_bytes().decode().split("\0")
            if "fairline.private.party" in words and any(word.startswith(str(folder)) for word in words):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def gone(folder: Path, timeout: float = 30) -> bool:
    deadline = time.monotonic() + timeout
    while parties_of(folder):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@spu
@pytest.mark.parametrize("surrogate", [pytest.param("quadratic", marks=pytest.mark.slow), "mixed"])
@pytest.mark.parametrize("protocol", ["cheetah", "semi2k"])
def test_a_private_inference_gives_the_plain_logits_at_the_predicted_price(protocol, surrogate):
    model = masked(settle(Everything()), torch.zeros(1, 3, 16, 16), 0.3, surrogate)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    told = []
    found = run(model, images, protocol=protocol, repeats=1, progress=told.append)
    with torch.no_grad():
        expected = model(images)
    torch.testing.assert_close(found.outputs, expected, rtol=0, atol=1e-2)
    assert found.max_abs_error == pytest.approx(float((found.outputs - expected).abs().max()), rel=0.2, abs=1e-5)
    assert found.bytes == pytest.approx(estimate(model, images, protocol=protocol, batch_size=2).bytes, rel=0.1)
    assert found.agreement == 1
    assert found.rounds > 0
    assert found.setup_bytes > 0
    assert found.operators["bytes"].sum() <= found.bytes
    assert "dealer" in found.caveat
    assert protocol in found.caveat.lower()
    assert told[-1].done == told[-1].total - 1


@spu
@pytest.mark.slow
def test_bytes_follow_the_relus_that_are_kept():
    """(bytes(r) − bytes(0)) / (bytes(1) − bytes(0)) ≤ r + 0.05 on both protocols."""
    graphs = {}
    for share in (0.0, 0.1, 0.5, 1.0):
        torch.manual_seed(0)
        model = masked(settle(build("cnn", 4, 3, 16, width=4)), torch.zeros(1, 3, 16, 16), share)
        graphs[f"{share}"] = to_graph(model, torch.zeros(1, 3, 16, 16))
    table = measure(graphs, torch.zeros(1, 3, 16, 16), repeats=1).table
    for _, part in table.groupby("protocol"):
        cost = part.set_index("network")["bytes"]
        for name, graph in graphs.items():
            share = (cost[name] - cost["0.0"]) / (cost["1.0"] - cost["0.0"])
            assert share <= graph.relus / graphs["1.0"].relus + 0.05
        # A layer without ReLUs saves rounds; thinning a layer does not.
        rounds = part.set_index("network")["rounds"]
        assert rounds["0.0"] < rounds["0.1"] == rounds["0.5"] < rounds["1.0"]


@spu
def test_each_party_is_given_its_own_files_alone(tmp_path):
    graph = to_graph(small(), IMAGES)
    plan = make_plan({"network": graph}, IMAGES, protocols=["semi2k"], batch_sizes=[2], repeats=1)
    two_processes(tmp_path, {"network": graph}, IMAGES, plan)
    owner, asker = tmp_path / "model", tmp_path / "image"
    assert owner.stat().st_mode & 0o077 == asker.stat().st_mode & 0o077 == 0
    weights = graph.weights[graph.nodes[-1].weights[0]].numpy().tobytes()
    image = IMAGES.numpy().tobytes()
    assert any(weights in file.read_bytes() for file in owner.iterdir())
    assert any(image in file.read_bytes() for file in asker.iterdir())
    assert not any(weights in file.read_bytes() for file in asker.iterdir())
    assert not any(image in file.read_bytes() for file in owner.iterdir())
    assert "weights" not in json.loads((asker / "job.json").read_text())
    assert "images" not in json.loads((owner / "job.json").read_text())


@spu
def test_an_interrupted_measurement_goes_on_at_the_next_call(tmp_path):
    graphs = {"a": to_graph(small(0.3), IMAGES), "b": to_graph(small(0.6, 1), IMAGES)}
    options = {"protocols": ["semi2k"], "batch_sizes": [1, 2], "repeats": 2, "seed": 3}
    file = tmp_path / "calls.json"

    class Stop(Exception):
        pass

    def interrupt(update):
        if file.exists():
            raise Stop

    with pytest.raises(Stop):
        measure(graphs, IMAGES, checkpoint=file, progress=interrupt, **options)
    plan = make_plan(graphs, IMAGES, **options)
    half = Session.resume(file, plan)
    assert 0 < half.done < len(plan.calls())
    kept = [row["seconds"] for row in half.calls[IMAGE_OWNER]]
    found = measure(graphs, IMAGES, checkpoint=file, **options)
    assert found.calls["seconds"].tolist()[: len(kept)] == kept
    assert len(found.calls) == len(plan.calls()) == 12
    assert found.table["calls"].tolist() == [4, 2, 4, 2]
    assert not found.table.isna().any().any()
    # Another plan does not take these calls for its own.
    other = make_plan(graphs, IMAGES, **{**options, "seed": 4})
    assert Session.resume(file, other).done == 0


@spu
@pytest.mark.parametrize("victim", [MODEL_OWNER, pytest.param(IMAGE_OWNER, marks=pytest.mark.slow)])
def test_killing_one_party_ends_the_other_with_a_clear_error(victim, temporary):
    killed = []

    def kill(update):
        if update.done > 2 and not killed:
            for pid in parties_of(temporary):
                job = Path((Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")[-2].decode())
                if json.loads(job.read_text())["role"] == victim:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    who = "weights" if victim == MODEL_OWNER else "images"
    with pytest.raises(FairlineError, match=f"process that holds the {who} was ended by SIGKILL"):
        measure({"n": small()}, IMAGES, protocols=["semi2k"], repeats=400, timeout=10, progress=kill)
    assert killed
    assert gone(temporary)


@spu
@pytest.mark.slow
def test_nothing_is_left_when_whoever_started_the_parties_is_killed(temporary):
    code = """
import sys, torch
from fairline.models import build
from fairline.private import measure
if __name__ == "__main__":
    measure({"n": build("cnn", 4, 3, 8, width=4)}, torch.zeros(1, 3, 8, 8), protocols=["semi2k"], repeats=2000,
        progress=lambda update: print(update.done, flush=True))
"""
    script = temporary / "script.py"
    script.write_text(code)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) > 3:
                break
        assert len(parties_of(temporary)) == 2
        process.kill()
    assert gone(temporary)


def job(tmp_path: Path, role: int, graph, **more) -> dict:
    folder = tmp_path / str(role)
    folder.mkdir()
    graph.save_public(folder / "public.safetensors")
    content = {
        "role": role,
        "folder": str(folder),
        "graphs": {"network": str(folder / "public.safetensors")},
        # SPU also gives up on a party that starts so much later.
        "timeout": 40,
        "connect_timeout": 5,
        **more,
    }
    if role == MODEL_OWNER and "weights" not in more:
        graph.save_weights(folder / "weights.safetensors")
        content["weights"] = {"network": str(folder / "weights.safetensors")}
    return content


def alone(tmp_path: Path, content: dict) -> str:
    """What a party says that nobody answers."""
    with PartyProcess.start(content["role"], Path(content["folder"]), content) as party:
        with pytest.raises(SessionError, match=r"^[^\n]*$") as failed:
            wait_for([party], Session.empty(), quiet=60)
        party.process.wait(10)
        assert party.process.returncode in (2, 4)
    return str(failed.value)


@spu
@pytest.mark.parametrize("survivor", [MODEL_OWNER, pytest.param(IMAGE_OWNER, marks=pytest.mark.slow)])
def test_a_survivor_without_a_launcher_says_that_the_other_is_gone(tmp_path, survivor):
    """As between two hosts: nobody but the link tells it."""
    graph = to_graph(small(), IMAGES)
    addresses = free_addresses()
    plan = make_plan({"network": graph}, IMAGES, protocols=["semi2k"], batch_sizes=[2], repeats=2000)
    save_tensors(tmp_path / "images.safetensors", {"images": IMAGES})
    own = {IMAGE_OWNER: {"images": str(tmp_path / "images.safetensors"), "plan": plan.model_dump()}, MODEL_OWNER: {}}
    jobs = [job(tmp_path, role, graph, addresses=addresses, **{**own[role], "connect_timeout": 90}) for role in (0, 1)]
    with (
        PartyProcess.start(0, tmp_path / "0", jobs[0]) as owner,
        PartyProcess.start(1, tmp_path / "1", jobs[1]) as asker,
    ):
        left, other = (owner, asker) if survivor == MODEL_OWNER else (asker, owner)
        while '"call"' not in (left.lines.get(timeout=60) or ""):
            pass
        other.process.kill()
        name = "image" if survivor == MODEL_OWNER else "model"
        # SPU may tell, give up, or crash; each is one sentence, within the timeout.
        with pytest.raises(
            SessionError, match=f"^The {name}'s owner stopped answering|^[^\\n]* was ended by SIG"
        ) as failed:
            wait_for([left], Session.empty(), quiet=90)
        assert "said nothing" not in str(failed.value)
        left.process.wait(10)


@spu
def test_nobody_at_the_other_end(tmp_path):
    addresses = free_addresses()
    said = alone(tmp_path, job(tmp_path, MODEL_OWNER, to_graph(small(), IMAGES), addresses=addresses))
    assert f"image's owner did not answer at {addresses[IMAGE_OWNER]} within 5 seconds" in said


@spu
def test_a_busy_port(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        addresses = [address, free_addresses()[0]]
        said = alone(tmp_path, job(tmp_path, MODEL_OWNER, to_graph(small(), IMAGES), addresses=addresses))
    assert f"{address} cannot be listened on" in said


@spu
def test_a_weight_file_of_another_network(tmp_path):
    other = to_graph(build("cnn", 4, 3, 8, width=2).eval(), IMAGES)
    other.save_weights(tmp_path / "other.safetensors")
    content = job(
        tmp_path,
        MODEL_OWNER,
        to_graph(small(), IMAGES),
        addresses=free_addresses(),
        weights={"network": str(tmp_path / "other.safetensors")},
    )
    said = alone(tmp_path, content)
    assert "other.safetensors holds weights of another network" in said


@spu
def test_parties_with_different_masks_part_before_anything_is_sent(tmp_path):
    mine, theirs = to_graph(small(0.3), IMAGES), to_graph(small(0.4), IMAGES)
    addresses = free_addresses()
    plan = make_plan({"network": theirs}, IMAGES, protocols=["semi2k"], batch_sizes=[2])
    save_tensors(tmp_path / "images.safetensors", {"images": IMAGES})
    jobs = [
        job(tmp_path, MODEL_OWNER, mine, addresses=addresses, connect_timeout=90),
        job(
            tmp_path,
            IMAGE_OWNER,
            theirs,
            addresses=addresses,
            images=str(tmp_path / "images.safetensors"),
            plan=plan.model_dump(),
            connect_timeout=90,
        ),
    ]
    with (
        PartyProcess.start(0, tmp_path / "0", jobs[0]) as owner,
        PartyProcess.start(1, tmp_path / "1", jobs[1]) as asker,
    ):
        told = []
        for party in (asker, owner):
            with pytest.raises(SessionError) as failed:
                wait_for([party], Session.empty(), quiet=90)
            told.append(str(failed.value))
    # SPU may drop the link of one of them meanwhile.
    assert any("different architectures or masks of network 'network'" in sentence for sentence in told), told


@spu
@pytest.mark.parametrize("bits", [8, 14])
def test_arithmetic_in_the_clear_is_the_fixed_point_arithmetic(bits):
    """Against exact integers, for a linear layer: equal up to the last bit, which truncation may round either way."""
    from fairline.private.fixed_point import in_the_clear

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    images = torch.randn(7, 3, 2, 2)
    graph = to_graph(model, images)
    found = in_the_clear(graph, images, 64, bits, batch_size=4).numpy()
    weight, bias = (value.numpy() for value in graph.weights.values())
    expected = fixed_point_linear(images.flatten(1).numpy(), weight, bias, bits)
    # Inputs are rounded by SPU to either neighbour: each product may move by the other factor's size.
    slack = (np.abs(weight).sum(1) + np.abs(images.flatten(1).numpy()).sum(1, keepdims=True) + 2) / 2**bits
    assert (np.abs(found - expected) <= slack).all()
    assert np.abs(found - expected).max() < 4 * 2.0**-bits + slack.max() / 4


@spu
def test_agreement_by_group():
    data = make_data(120, classes=4, groups=3)
    torch.manual_seed(0)
    model = settle(build("cnn", 4, 1, 8, width=4))
    table = agreement(model, data, fraction_bits=[3, 16], samples=10, batch_size=16)
    counts = table.set_index(["fraction_bits", "group"])["n"]
    assert counts[16].to_dict() == {"group 0": 10, "group 1": 10, "group 2": 10, "overall": 30}
    fine, coarse = (table[table["fraction_bits"] == bits].set_index("group") for bits in (16, 3))
    assert (fine["agreement"] == 1).all()
    assert fine["max_abs_error"].max() < 1e-3 < coarse["max_abs_error"].max()
    assert (fine["accuracy_plain"] == coarse["accuracy_plain"]).all()
    assert ((table["low"] <= table["agreement"]) & (table["agreement"] <= table["high"])).all()
    own = coarse.drop("overall")
    assert coarse.loc["overall", "agreement"] == pytest.approx((own["agreement"] * own["n"]).sum() / own["n"].sum())


@spu
def test_agreement_on_the_real_protocol_is_close_to_that_in_the_clear():
    data = make_data(60, classes=4, groups=2)
    torch.manual_seed(0)
    model = settle(build("cnn", 4, 1, 8, width=4))
    clear, real = (
        agreement(model, data, fraction_bits=[10], samples=4, protocol=protocol).set_index("group")
        for protocol in ("ref2k", "semi2k")
    )
    assert real["mean_abs_error"].between(clear["mean_abs_error"] / 4, clear["mean_abs_error"] * 4).all()


@spu
@pytest.mark.parametrize(
    ("late", "timeout"),
    [pytest.param(0, 20, id="at once"), pytest.param(20, 5, id="after SPU gave the link up", marks=pytest.mark.slow)],
)
def test_serve_and_query(tmp_path, late, timeout):
    from PIL import Image

    from fairline.private.serve import Addresses, Preprocessing, query, read_images, serve

    graph = to_graph(small(), IMAGES)
    (tmp_path / "public").mkdir()
    graph.save_public(tmp_path / "public" / "graph.safetensors")
    graph.save_weights(tmp_path / "weights.safetensors")
    preprocessing = Preprocessing(shape=(3, 8, 8), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3), class_names=tuple("abcd"))
    (tmp_path / "public" / "images.json").write_text(preprocessing.model_dump_json())
    files = []
    for seed in range(2):
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
        files.append(tmp_path / f"{seed}.png")
        Image.fromarray(pixels).save(files[-1])
    host, other = free_addresses()
    addresses = Addresses(model=host, image=other)
    failed: list[BaseException] = []

    def be_served():
        try:
            serve(tmp_path, addresses, timeout=timeout)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=be_served)
    thread.start()
    time.sleep(late)
    answer = query(tmp_path / "public", addresses, files, protocol="semi2k", timeout=20)
    thread.join(60)
    assert not thread.is_alive()
    assert not failed
    expected = graph(read_images(files, preprocessing))
    torch.testing.assert_close(answer.logits, expected, rtol=0, atol=1e-2)
    assert answer.predictions == [preprocessing.class_names[i] for i in expected.argmax(1)]
    assert answer.bytes > 0
    with pytest.raises(SessionError, match="model's owner did not answer"):
        query(tmp_path / "public", addresses, files[:1], protocol="semi2k", wait=2)


@spu
@pytest.mark.slow
def test_a_slow_network_is_felt():
    """Rounds wait for each other: a hundred times the delay cannot take less long."""
    model, images = small(), IMAGES[:1]
    quick = run(model, images, protocol="semi2k", repeats=1)
    slow = run(model, images, protocol="semi2k", repeats=1, network=Network("own", 0.05, 1e8))
    torch.testing.assert_close(slow.outputs, quick.outputs, rtol=0, atol=1e-3)
    assert slow.bytes == quick.bytes
    # No bound on a time: what the emulation itself adds by construction.
    assert slow.seconds > 0.025 * 10


def test_options_that_no_session_can_do():
    graph = to_graph(small(), IMAGES)
    for options, words in (
        ({"protocols": ["magic"]}, "no protocol 'magic'"),
        ({"protocols": ["cheetah"], "batch_sizes": [0]}, "at least one image"),
        ({"protocols": ["cheetah"], "repeats": 0}, "one timed call"),
        ({"protocols": ["cheetah"], "ring_bits": 32}, "64 or 128 bits, not 32"),
        ({"protocols": ["cheetah"], "fraction_bits": 31}, "do not fit"),
    ):
        with pytest.raises(FairlineError, match=words):
            make_plan({"network": graph}, IMAGES, **{"batch_sizes": [1], **options})
    with pytest.raises(FairlineError, match=r"images have shape \(3, 9, 9\), but network 'network' takes \(3, 8, 8\)"):
        make_plan({"network": graph}, torch.zeros(1, 3, 9, 9), protocols=["cheetah"], batch_sizes=[1])


def test_calls_come_in_random_order_and_may_be_skipped():
    plan = Plan(
        protocols=["cheetah", "semi2k"],
        networks={"a": "", "b": ""},
        batch_sizes=[1, 4],
        images=4,
        repeats=3,
    )
    calls = plan.calls()
    assert len(calls) == 2 * 2 * (4 + 1) * 3
    assert calls != sorted(calls)
    assert calls == plan.calls()
    assert plan.model_copy(update={"skip": 7}).calls() == calls[7:]


def test_the_digest_covers_masks_and_shapes_but_no_weights():
    graph = to_graph(small(0.3), IMAGES)
    assert graph_digest(graph) == graph_digest(graph.public())
    assert graph_digest(graph) != graph_digest(to_graph(small(0.4), IMAGES))


def test_the_digest_is_of_what_is_computed_not_of_names():
    """A network that keeps all its ReLUs costs what the unmasked one costs, whose ReLUs are called otherwise."""
    torch.manual_seed(0)
    model = settle(build("resnet18", 4, 3, 16, width=2))
    example = torch.zeros(1, 3, 16, 16)
    plain, kept = to_graph(model, example), to_graph(masked(model, example, 1.0), example)
    assert [node.name for node in plain.nodes] != [node.name for node in kept.nodes]
    assert graph_digest(plain) == graph_digest(kept)


def test_without_spu_it_says_what_to_install(monkeypatch):
    from fairline.private import spu as module

    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FairlineError, match=r"pip install 'fairline\[mpc\]'"):
        run(small(), IMAGES)
    with pytest.raises(FairlineError, match="normalised images"):
        module.checked_images(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_the_relay_passes_everything_on():
    from fairline.private.wire import Relay

    with socket.create_server(("127.0.0.1", 0)) as server:
        relay = Relay(f"127.0.0.1:{server.getsockname()[1]}", Network("own", 0.002, 1e9))
        payload = os.urandom(300_000)
        with socket.create_connection(relay.address.rsplit(":", 1)) as near:
            far, _ = server.accept()
            with far:
                for source, sink in ((near, far), (far, near)):
                    source.sendall(payload)
                    got = b""
                    while len(got) < len(payload):
                        got += sink.recv(1 << 16)
                    assert got == payload
                near.shutdown(socket.SHUT_WR)
                assert far.recv(10) == b""
        relay.close()
