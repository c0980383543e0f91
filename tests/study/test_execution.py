"""Studies that are killed, shared, run on a cluster or in another kind of store give the same table."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import math
import operator
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal

from fairline import data, models
from fairline._cores import quota
from fairline.errors import FairlineError
from fairline.jobs import finetune_job, linearize_job, train_job
from fairline.study.cell import Cell
from fairline.study.cells import cells_of, require_known
from fairline.study.estimate import estimate
from fairline.study.executors import Local, RayCluster, WorkerLost
from fairline.study.run import run_study, status
from fairline.study.spec import Masks, load_spec
from fairline.study.storage import Storage
from fairline.study.store import COLUMNS, read_results
from tests.commands import ENVIRONMENT, Started, command, fairline, ok

SPEC = Path(__file__).parent / "digits.yaml"
#: The first seed of it, which shares its cells.
ONE_SEED = Path(__file__).parent / "one_seed.yaml"
#: What may differ between two runs of the same cells.
WHEN_AND_WHERE = ["commit", "device", "versions", "started"]


def measured(source: str | Path) -> pd.DataFrame:
    return read_results([source]).drop(columns=WHEN_AND_WHERE)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "store"
    ok("study", "run", SPEC, "--out", out)
    return out


@pytest.fixture(scope="module")
def undisturbed(finished) -> pd.DataFrame:
    return measured(finished)


@pytest.fixture(scope="module")
def undisturbed_seed(undisturbed) -> pd.DataFrame:
    """What a store of :data:`ONE_SEED` holds."""
    one = undisturbed[undisturbed["seed"] == 0].reset_index(drop=True)
    return one.assign(study="one_seed", spec_hash=load_spec(ONE_SEED).digest)


def start(*arguments: str | Path) -> Started:
    return Started("study", "run", ONE_SEED, *arguments)


def processes(*words: str) -> list[int]:
    """Processes of this machine whose command line has all the words."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if all(word in line for word in words):
                found.append(int(entry.name))
    return found


def children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            if parent == pid and "spawn_main" in (entry / "cmdline").read_text():
                found.append(int(entry.name))
    return found


def kill_and_go_on(out: Path, kills: int, seed: int) -> None:
    """Kill the study, or one of its workers, at random moments until it has been killed so often; then let it end."""
    chance = random.Random(seed)
    killed = 0
    while killed < kills:
        process = start("--out", out, "--jobs", "2")
        time.sleep(chance.uniform(0.5, 10))
        workers = children(process.pid)
        if chance.random() < 0.3 and workers:
            os.kill(chance.choice(workers), signal.SIGKILL)
            time.sleep(1)
        process.kill()
        process.result()
        killed += 1
        deadline = time.monotonic() + 90
        while any(Path(f"/proc/{worker}").exists() for worker in workers):
            assert time.monotonic() < deadline, "a worker outlives its study"
            time.sleep(0.1)
    ok("study", "run", ONE_SEED, "--out", out, "--jobs", "2")


@pytest.mark.slow
def test_killed_at_a_random_moment_it_gives_the_same_table(undisturbed_seed, tmp_path):
    kill_and_go_on(tmp_path / "store", 1, 0)
    assert_frame_equal(measured(tmp_path / "store"), undisturbed_seed)


@pytest.mark.slow
def test_killed_at_twenty_random_moments_it_gives_the_same_table(undisturbed_seed, tmp_path):
    kill_and_go_on(tmp_path / "store", 20, 1)
    assert_frame_equal(measured(tmp_path / "store"), undisturbed_seed)


def test_a_lost_worker_costs_nothing_but_time(undisturbed_seed, tmp_path):
    process = start("--out", tmp_path / "store")
    deadline = time.monotonic() + 300
    while not list((tmp_path / "store" / "cells").glob("linearize-*/status.json")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for worker in children(process.pid):
        os.kill(worker, signal.SIGKILL)
    done = process.result(600)
    assert done.returncode == 0, done.stderr
    assert_frame_equal(measured(tmp_path / "store"), undisturbed_seed)


def test_two_processes_share_a_study(undisturbed_seed, tmp_path):
    both = [start("--out", tmp_path / "store") for _ in range(2)]
    for process in both:
        done = process.result(600)
        assert done.returncode == 0, done.stderr
    assert_frame_equal(measured(tmp_path / "store"), undisturbed_seed)


class Recording:
    """Runs nothing; keeps what it was given."""

    slots = 1

    def __init__(self) -> None:
        self.given: list[Cell] = []

    def submit(self, _: object, cell: Cell, *__: object) -> Future[str]:
        self.given.append(cell)
        future: Future[str] = Future()
        future.set_result("done")
        return future

    def close(self) -> None:
        pass


def test_the_first_seed_of_every_study_comes_before_the_second_of_any(tmp_path):
    first = load_spec(SPEC)
    second = first.model_copy(update={"name": "wider", "model": first.model.model_copy(update={"options": {}})})
    executor = Recording()
    with pytest.raises(FairlineError):  # there is nothing to read in the end
        run_study([first, second], tmp_path / "store", executor=executor)
    seeds = [cell.about.get("seed", math.inf) for cell in executor.given]
    assert seeds == sorted(seeds)
    assert {cell.key for cell in executor.given} == {cell.key for spec in (first, second) for cell in cells_of(spec)}


def test_studies_share_their_cells(tmp_path):
    base = load_spec(SPEC).model_copy(update={"seeds": [0]})
    more = base.model_copy(update={"name": "more", "methods": base.methods[:1]})
    own, other = ({cell.key for cell in cells_of(spec)} for spec in (base, more))
    assert len(other - own) == 1  # the comparison
    other_seed = {cell.key for cell in cells_of(base.model_copy(update={"seeds": [1]}))}
    assert not own & other_seed
    longer = base.model_copy(update={"finetune": {**base.finetune, "epochs": 3}})
    kinds = {cell.kind for cell in cells_of(longer) if cell.key in own}
    assert kinds == {"train", "linearize", "audit"}


def test_the_hash_is_of_all_that_determines_a_cell():
    parent = Cell("train", {"seed": 0})
    assert Cell("finetune", {"a": 1}, (parent,)).key != Cell("finetune", {"a": 1}, (Cell("train", {"seed": 1}),)).key
    assert Cell("finetune", {"a": 1}).key != Cell("finetune", {"a": 2}).key
    assert Cell("finetune", {"a": 1}).key != Cell("audit", {"a": 1}).key
    assert Cell("finetune", {"a": 1, "b": 2}, where="here").key == Cell("finetune", {"b": 2, "a": 1}, where="there").key


@pytest.mark.parametrize(
    ("said", "more", "named"),
    [
        ("true", {}, "last layer"),
        ("dfr", {}, "last layer"),
        ("afr", {"method": "afr"}, "AFR"),
        ("self", {"method": "self"}, "SELF"),
        ("{within: 1}", {"within": 1.0}, "last layer within=1"),
        ("[{method: afr, within: 0.5}]", {"method": "afr", "within": 0.5}, "AFR within=0.5"),
        ("{balance: class, part: train}", {"balance": "class", "part": "train"}, "last layer by class on train"),
    ],
)
def test_a_way_to_the_last_layer_is_part_of_its_cell(said, more, named, tmp_path):
    path = tmp_path / "last.yaml"
    path.write_text(SPEC.read_text().replace("{objective: erm,", f"{{objective: erm, last_layer: {said},"))
    cells = [cell for cell in cells_of(load_spec(path)) if cell.kind == "last-layer"]
    assert {cell.about["finetune"] for cell in cells} == {f"erm, {named}"}
    assert all(cell.arguments == {"seed": cell.about["seed"], **more} for cell in cells)


def test_several_ways_to_the_last_layer_are_a_cell_each(tmp_path):
    path = tmp_path / "last.yaml"
    path.write_text(
        SPEC.read_text().replace(
            "{objective: erm,", "{objective: erm, last_layer: [self, dfr, {method: dfr}, {within: 1}],"
        )
    )
    cells = [cell for cell in cells_of(load_spec(path)) if cell.kind == "last-layer"]
    assert {cell.about["finetune"] for cell in cells} == {"erm, SELF", "erm, last layer", "erm, last layer within=1"}
    assert len({cell.where for cell in cells}) == len(cells)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("{method: afr, balance: class}", "images are balanced by class under dfr only"),
        ("{within: -1}", "greater than or equal to 0"),
        ("{within: .inf}", "finite"),
        ("false, adjust: [{tau: .nan}]", "finite"),
        ("false, adjust: [{within: -5}]", "greater than or equal to 0"),
    ],
)
def test_settings_of_a_last_layer_out_of_range_are_refused_in_the_spec(said, words, tmp_path):
    path = tmp_path / "last.yaml"
    path.write_text(SPEC.read_text().replace("{objective: erm,", f"{{objective: erm, last_layer: {said},"))
    with pytest.raises(FairlineError, match=words):
        load_spec(path)


@pytest.mark.slow
def test_another_kind_of_store_gives_the_same_table(undisturbed_seed, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    monkeypatch.setenv("FAIRLINE_SCRATCH", str(scratch))
    path = f"file://{tmp_path}/bucket"
    runs = run_study(load_spec(ONE_SEED), path)
    assert (runs["one_seed"]["digits"].folder / "comparison.parquet").exists()
    assert Storage(path).local.is_relative_to(scratch)
    assert_frame_equal(measured(path), undisturbed_seed)
    # A machine that has nothing yet finds all of it in the store.
    monkeypatch.setenv("FAIRLINE_SCRATCH", str(tmp_path / "elsewhere"))
    assert set(status(path)["state"]) == {"finished"}
    assert_frame_equal(measured(path), undisturbed_seed)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["", "file://"])
def test_a_ray_cluster_that_loses_a_worker_gives_the_same_table(undisturbed_seed, tmp_path, monkeypatch, protocol):
    pytest.importorskip("ray")
    monkeypatch.setitem(ENVIRONMENT, "FAIRLINE_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("FAIRLINE_SCRATCH", str(tmp_path / "scratch"))
    store = f"{protocol}{tmp_path}/store"
    process = start("--out", store, "--ray", "local")
    deadline = time.monotonic() + 240
    while not list((tmp_path / "store" / "cells").glob("linearize-*/status.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.result().stderr
        time.sleep(0.05)
    workers = processes("ray::_task")
    assert workers
    os.kill(workers[0], signal.SIGKILL)
    done = process.result(600)
    assert done.returncode == 0, done.stderr
    assert_frame_equal(measured(store), undisturbed_seed)


@pytest.mark.slow
def test_cells_share_a_gpu_of_a_cluster(tmp_path):
    """Ray counts a GPU that it is told of, so this needs none: two cells of half a GPU meet, a third has to wait."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False)

    def meet(own: str, other: str) -> tuple[list[int], str]:
        import ray

        seen = sorted(file.name for file in tmp_path.iterdir())
        (tmp_path / own).touch()
        deadline = time.monotonic() + 60
        while not (tmp_path / other).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (tmp_path / other).exists()
        time.sleep(2)
        (tmp_path / f"{own}-ended").touch()
        return ray.get_gpu_ids(), ",".join(seen)

    try:
        cluster = RayCluster(cpus=1, gpus=0.5)
        pair = [cluster.submit(meet, "first", "second"), cluster.submit(meet, "second", "first")]
        third = cluster.submit(meet, "third", "third")
        assert [one.result(120)[0] for one in pair] == [[0], [0]]
        assert "-ended" in third.result(120)[1]
        with pytest.raises(FairlineError, match="asks for 2 GPUs, and no machine of the cluster has more than 1"):
            RayCluster(cpus=1, gpus=2)
    finally:
        ray.shutdown()


def test_a_cluster_that_is_not_there_is_told():
    pytest.importorskip("ray")
    with pytest.raises(FairlineError, match=r"^No Ray cluster at '127\.0\.0\.1:1': .*\.$"):
        RayCluster("127.0.0.1:1")


def _end(_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("given", "jobs", "each"), [(1, 1, 1), (1, 2, 1), (4, 2, 2), (5, 2, 2)])
def test_a_study_takes_no_more_threads_than_it_was_given(given, jobs, each):
    before = torch.get_num_threads()
    torch.set_num_threads(given)
    try:
        pool = Local(jobs)
        try:
            assert pool.submit(torch.get_num_threads).result() == each
        finally:
            pool.close()
    finally:
        torch.set_num_threads(before)


def _all_threads() -> dict[str, int]:
    """What each library of this process takes, after each has worked."""
    import numpy as np
    from threadpoolctl import threadpool_info

    from fairline.data import _images

    torch.ones(600, 600) @ torch.ones(600, 600)
    np.ones((600, 600)) @ np.ones((600, 600))
    pools = {f"{each['internal_api']} {each['prefix']}": each["num_threads"] for each in threadpool_info()}
    return {**pools, "torch": torch.get_num_threads(), "decoding": _images._THREADS}


def test_no_library_of_a_worker_takes_more_and_this_process_is_left_as_it_was(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = dict(os.environ)
    pool = Local(2, threads=1)
    try:
        taken = pool.submit(_all_threads).result()
    finally:
        pool.close()
    assert len(taken) > 2
    assert set(taken.values()) == {1}
    assert dict(os.environ) == before


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is Linux's")
@pytest.mark.parametrize("variables", [{}, {"OMP_NUM_THREADS": "1"}])
def test_a_study_keeps_to_the_cores_of_its_process(variables):
    known = "import os, sys; "
    if not variables:
        known += "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    code = known + "from fairline.study.executors import Local; from fairline.data import _images; "
    code += "print(Local(1).threads, Local(2).threads, _images._THREADS)"
    plain = {name: value for name, value in ENVIRONMENT.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=plain | variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1", "1", "1"]


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu.max": ""}, None),
        ({}, None),
    ],
)
def test_the_quota_of_a_control_group_is_known(tmp_path, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert quota(tmp_path) == cores


def test_a_worker_that_dies_is_told_apart_from_a_cell_that_fails():
    pool = Local(1)
    try:
        assert isinstance(pool.submit(_end, None).exception(60), WorkerLost)
        assert pool.submit(len, "abc").result(60) == 3
        assert isinstance(pool.submit(len, 1).exception(60), TypeError)
    finally:
        pool.close()


def test_processes_end_with_their_pool_whatever_they_do():
    pool = Local(1)
    assert pool.submit(len, "abc").result(60) == 3
    pool.submit(time.sleep, 600)
    (process,) = pool._pool._processes.values()
    pool.close()
    # Not join: the pool's own thread may reap it, and has not said so yet.
    deadline = time.monotonic() + 60
    while process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not process.is_alive()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": {"x": {"name": "mnist"}}}, "data.x: there is no data set 'mnist'; choose one of digits"),
        ({"model": {"name": "lenet"}}, "model: There is no model 'lenet'"),
        ({"model": {"name": "cnn", "options": {"depth": 3}}}, "model: Model 'cnn' knows no option 'depth'"),
        ({"train": {"epoch": 3}}, "train: there is no setting 'epoch'"),
        ({"train": {"augment": "false"}}, "train: option 'augment' is true or false, not 'false'"),
        ({"train": {"batch_size": "0x40"}}, "train: option 'batch_size' is a whole number, not '0x40'"),
        ({"finetune": {"select": "best"}}, "finetune: option 'select' is accuracy, loss, worst_group_accuracy or last"),
        ({"finetune": {"clip": "none"}}, "finetune: option 'clip' is a number or none, not 'none'"),
        ({"finetune": {"lrr": 3}}, "finetune: there is no setting 'lrr'"),
        ({"masks": {"plain": {"budgets": [0.1], "method": "snip"}}}, "masks.plain: There is no linearizer 'snip'"),
        (
            {"masks": {"plain": {"budgets": [0.1], "settings": {"lamb": 1}}}},
            "masks.plain: Linearizer 'snl' knows no option",
        ),
        (
            {"masks": {"plain": {"budgets": [0.1], "settings": {"for_cost": {"protocol": "morse"}}}}},
            "masks.plain: There is no cost model of 'morse'",
        ),
        ({"methods": [{"objective": "fair", "masks": ["plain"]}]}, "methods.0: There is no objective 'fair'"),
        ({"audit": {"measures": ["speed"]}}, "audit.measures: there is no measure 'speed'"),
        ({"audit": {"base": ["speed"]}}, "audit.base: there is no measure 'speed'"),
        ({"audit": {"options": {"speed": {}}}}, "audit.options: there is no measure 'speed'"),
        ({"audit": {"options": {"margin": {}}}}, "audit.options: 'margin' is not measured."),
        (
            {"audit": {"base": ["curvature"], "options": {"curvature": {"tolerence": 1e-3}}}},
            "audit.options.curvature: The measure 'curvature' knows no option 'tolerence'",
        ),
    ],
)
def test_what_nothing_knows_is_refused_before_anything_runs(tmp_path, change, words):
    spec = type(load_spec(SPEC)).model_validate({**load_spec(SPEC).model_dump(), **change})
    with pytest.raises(FairlineError) as refused:
        run_study(spec, tmp_path / "store")
    assert f"Study 'digits_tiny', {words}" in str(refused.value)
    assert not (tmp_path / "store").exists()
    require_known(load_spec(SPEC))


@pytest.mark.parametrize(
    ("audit", "of_base", "of_others"),
    [
        ({"base": ["curvature"]}, {"curvature", "accuracy"}, {"accuracy"}),
        ({"measures": ["curvature"]}, {"curvature", "accuracy"}, {"curvature", "accuracy"}),
        ({"explain": True}, {"curvature", "accuracy"}, {"curvature", "accuracy"}),
    ],
)
def test_options_of_measures_go_where_these_are_taken(audit, of_base, of_others):
    options = {"curvature": {"tolerance": 1e-3}, "accuracy": {}}
    spec = type(load_spec(SPEC)).model_validate(
        {**load_spec(SPEC).model_dump(), "audit": {**audit, "options": options}}
    )
    require_known(spec)
    audits = [cell for cell in cells_of(spec) if cell.kind == "audit"]
    given = {cell.parents[0].kind: set(cell.arguments["options"]) for cell in audits}
    assert given == {"train": of_base, "finetune": of_others}


#: What a study hands to each call beside what its file says there, by where it says it.
HANDED = {
    ("data", "x", "options"): (data.load, ("name", "root")),
    ("model", "options"): (models.build, ("name", "num_classes", "in_channels", "image_size")),
    ("train",): (train_job, ("out", "data", "model", "model_options", "seed", "device", "progress")),
    ("finetune",): (finetune_job, ("source", "out", "objective", "objective_options", "seed", "device", "progress")),
    ("masks", "plain", "settings"): (
        linearize_job,
        ("source", "out", "budgets", "method", "objective", "objective_options", "seed", "device", "progress"),
    ),
}


@pytest.mark.parametrize("where", HANDED, ids=".".join)
@pytest.mark.parametrize("value", [3, None, "cpu"])
def test_what_a_study_gives_itself_is_not_for_its_file_to_say(where, value):
    call, names = HANDED[where]
    assert set(names) <= set(inspect.signature(call).parameters)
    plain = {
        "data": {"x": {"name": "digits", "options": {}}},
        "model": {"name": "cnn", "options": {}},
        "train": {},
        "finetune": {},
        "masks": {"plain": {"budgets": [0.1], "settings": {}}},
    }
    for name in names:
        change = copy.deepcopy(plain)
        functools.reduce(operator.getitem, where, change)[name] = value
        spec = type(load_spec(SPEC)).model_validate({**load_spec(SPEC).model_dump(), **change})
        with pytest.raises(FairlineError, match=f"Study '{spec.name}', {re.escape('.'.join(where[:1]))}.*'{name}'"):
            require_known(spec)


@pytest.mark.slow
def test_a_full_disk_is_told_and_nothing_is_lost(undisturbed, tmp_path):
    """A limit on the size of files stands for the full disk: writing fails midway."""
    store = tmp_path / "store"
    limited = " ".join(map(str, ["ulimit -f 8;", *command("study", "run", SPEC, "--out", store)]))
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 2, done.stderr
    assert "cells failed; " in done.stderr
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert {"failed", "waiting"} <= set(status(store)["state"])
    ok("study", "run", SPEC, "--out", store)
    assert_frame_equal(measured(store), undisturbed)


@pytest.mark.slow
def test_a_table_cut_short_is_told_and_can_be_computed_again(finished, undisturbed, tmp_path):
    store = shutil.copytree(finished, tmp_path / "store", symlinks=True)
    (audit,) = (store / "digits_tiny" / "digits-0" / "base-audit").resolve().glob("audit.parquet")
    audit.write_bytes(audit.read_bytes()[:-100])
    done = fairline("study", "run", SPEC, "--out", store)
    assert done.returncode == 2
    sentence = f"{audit} is cut short or broken; remove the folder {audit.parent} to compute it again."
    assert sentence in " ".join(done.stderr.split())
    shutil.rmtree(audit.parent)
    ok("study", "run", SPEC, "--out", store)
    assert_frame_equal(measured(store), undisturbed)


def test_the_table_says_where_every_row_comes_from(undisturbed, tmp_path):
    assert list(undisturbed.columns) == [name for name in COLUMNS if name not in WHEN_AND_WHERE]
    assert (undisturbed["spec_hash"] == load_spec(SPEC).digest).all()
    accuracy = undisturbed[undisturbed["measure"] == "accuracy"]
    assert not accuracy.duplicated(["seed", "stage", "finetune", "asked", "group"]).any()
    # Two seeds; the base network, and two finetunes at two budgets; ten groups and all images.
    assert len(accuracy) == 2 * 5 * 11
    assert set(accuracy.loc[accuracy["stage"] == "finetuned", "asked"]) == {448, 45}
    assert (accuracy["relus"] <= accuracy["asked"]).all()
    (tmp_path / "results.parquet").write_bytes(b"PAR1")
    with pytest.raises(FairlineError, match="cut short or broken"):
        read_results([tmp_path])
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "results.parquet")
    with pytest.raises(FairlineError, match="has no column 'study'"):
        read_results([tmp_path])
    with pytest.raises(FairlineError, match="holds no results of a study"):
        read_results([tmp_path / "nowhere"])


def test_a_dry_run_estimates_from_steps_and_then_from_what_was_run(finished, tmp_path):
    said = ok("study", "run", SPEC, "--out", tmp_path / "store", "--dry-run")
    assert "reckoned" in said
    assert "at a time, at most" in said
    assert not (tmp_path / "store").exists()
    store = shutil.copytree(finished, tmp_path / "store", symlinks=True)
    more = tmp_path / "more.yaml"
    more.write_text(SPEC.read_text().replace("seeds: [0, 1]", "seeds: [1, 2]").replace("digits_tiny", "more_seeds"))
    said = ok("study", "run", more, "--out", store, "--dry-run")
    (train,) = (line for line in said.splitlines() if "train" in line)
    assert train.replace("│", " ").split()[:4] == ["train", "2", "1", "1"]
    assert "measured" in train
    # Another network under the same settings: its epochs are known, its speed is not.
    wider = tmp_path / "wider.yaml"
    wider.write_text(SPEC.read_text().replace("width: 4", "width: 5").replace("digits_tiny", "wider"))
    spec = load_spec(wider)
    table = estimate([spec], Storage(str(store))).set_index("kind")
    assert table.loc["linearize", "basis"] == "past epochs"
    assert table.loc["train", "basis"] == "reckoned"
    many = {**spec.model_dump()["masks"]["plain"], "settings": {"max_epochs": 2000}}
    longer = spec.model_copy(update={"masks": {"plain": Masks(**many)}})
    assert estimate([longer], Storage(str(store))).set_index("kind").loc["linearize", "basis"] == "reckoned"
    # How often a search trains, its settings do not say.
    searched = spec.model_copy(update={"masks": {"plain": Masks(budgets=[0.1], method="delphi")}})
    assert estimate([searched], Storage(str(store))).set_index("kind").loc["linearize", "basis"] == "unknown"


def test_an_audit_without_the_base_network_has_a_frontier(finished, tmp_path):
    audit = finished / "digits_tiny" / "digits-0" / "plain-erm-audit"
    assert json.loads((audit / "config.json").read_text())["with_base"] is False
    ok("frontier", audit, "--out", tmp_path / "frontier")
    models = set(pd.read_parquet(tmp_path / "frontier" / "frontier.parquet")["model"])
    assert models == set(pd.read_parquet(audit / "audit.parquet")["model"])


def test_a_frontier_of_a_study_names_its_networks_and_the_study(finished, tmp_path):
    networks = finished / "digits_tiny" / "digits-0"
    ok("audit", networks / "plain-erm", networks / "plain-lagrangian", "--resamples", "50", "--out", tmp_path / "audit")
    ok("frontier", tmp_path / "audit", "--out", tmp_path / "frontier", "--results", tmp_path / "results")
    table = pd.read_csv(tmp_path / "results" / "frontier.csv")
    assert {name.partition("/")[0] for name in table["model"]} == {"base", "plain-erm", "plain-lagrangian"}
    (study,) = json.loads((tmp_path / "results" / "provenance.json").read_text())["studies"]
    assert (study["name"], study["spec_hash"]) == ("digits_tiny", load_spec(SPEC).digest)
