"""The numbers of each epoch reach the tools in which people look at their runs."""

import json
import time

import pandas as pd
import pytest

import fairline as fl
from fairline.cli.options import LOG_TOOLS
from fairline.errors import FairlineError
from fairline.models import build
from fairline.training import LOGGERS, Progress
from tests.commands import FINETUNE, LINEARIZE, TRAIN, ok

EPOCHS = 2


def trained_into(tools, folder, parts):
    """A short training whose history is the truth; returns that."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"command": "train", "settings": {"lr": 0.05}, "lineage": {"x": 1}}))
    with fl.log_to(tools, folder) as progress:
        model = build("cnn", 3, 1, 8, width=4)
        history = fl.train(model, *parts[:2], epochs=EPOCHS, batch_size=32, lr=0.05, progress=progress)
    return pd.DataFrame(history).set_index("epoch").drop(columns="seconds")


def assert_same(told, history):
    """Names → a value an epoch."""
    assert {name.removeprefix("training/") for name in told} == {*history.columns, "seconds"}
    for name, column in history.items():
        assert [told[f"training/{name}"][epoch] for epoch in history.index] == pytest.approx(list(column), rel=1e-5)


def test_csv(tmp_path, parts):
    history = trained_into("csv", tmp_path / "run", parts)
    rows = pd.read_csv(tmp_path / "run" / "logs" / "csv" / "metrics.csv")
    told = {}
    for stage, epoch, name, value in rows.itertuples(index=False):
        told.setdefault(f"{stage}/{name}", {})[epoch] = value
    assert_same(told, history)
    # A run that goes on adds to what there is.
    trained_into("csv", tmp_path / "run", parts)
    again = pd.read_csv(tmp_path / "run" / "logs" / "csv" / "metrics.csv")
    assert len(again) == 2 * len(rows)


def test_tensorboard(tmp_path, parts):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = trained_into("tensorboard", tmp_path / "run", parts)
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "tensorboard")).Reload()
    tags = events.Tags()["scalars"]
    assert_same({tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}, history)
    (text,) = (event.tensor_proto.string_val[0].decode() for event in events.Tensors("config/text_summary"))
    assert "settings.lr**: 0.05" in text
    assert "lineage" not in text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mlflow(tmp_path, parts, monkeypatch):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    history = trained_into(["mlflow"], tmp_path / "run", parts)
    folder = tmp_path / "run" / "logs" / "mlflow"
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    run = client.get_run((folder / "run_id.txt").read_text())
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert run.data.params["settings.lr"] == "0.05"
    told = {
        name: {each.step: each.value for each in client.get_metric_history(run.info.run_id, name)}
        for name in run.data.metrics
    }
    assert_same(told, history)


def records(raw):
    """What a .wandb file holds: LevelDB's log format behind a header of seven bytes."""
    block, place, whole = 32768, 7, b""
    while place + 7 <= len(raw):
        if block - place % block < 7:
            place += block - place % block
            continue
        size, kind = int.from_bytes(raw[place + 4 : place + 6], "little"), raw[place + 6]
        whole += raw[place + 7 : place + 7 + size]
        place += 7 + size
        # 1 is a whole record, 4 the last part of one.
        if kind in (1, 4):
            yield whole
            whole = b""


def test_wandb_offline(tmp_path, parts, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    history = trained_into("wandb", tmp_path / "run", parts)
    (file,) = (tmp_path / "run" / "logs" / "wandb").rglob("run-*.wandb")

    def told():
        found = {}
        for raw in records(file.read_bytes()):
            items = Record.FromString(raw).history.item
            numbers = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            epoch = numbers.pop("training/epoch", None)
            for name, value in numbers.items():
                if name.startswith("training/"):
                    found.setdefault(name, {})[epoch] = value
        return found

    # A process of the tool's own writes, and on a busy machine it is late.
    deadline = time.monotonic() + 120
    while not any(EPOCHS in values for values in told().values()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert_same(told(), history)


def test_names_fit_every_tool_and_what_is_no_number_stays_out(tmp_path):
    metrics = {"epoch": 1, "lambda[men × 65+]": 0.5, "worst": "men", "val_loss": float("nan")}
    with fl.log_to("csv", tmp_path) as progress:
        progress(Progress("SNL mask learning", 3, 6))
        assert not (tmp_path / "logs").exists()
        progress(Progress("SNL mask learning", 3, 6, metrics=metrics))
    rows = pd.read_csv(tmp_path / "logs" / "csv" / "metrics.csv").to_numpy().tolist()
    assert rows == [["SNL mask learning", 1, "lambda/men _ 65_", 0.5]]


def test_a_tool_that_is_none_or_not_installed_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(FairlineError, match="no logger 'excel'; choose among csv"), fl.log_to("excel", tmp_path):
        pass
    monkeypatch.setitem(LOGGERS, "csv", (LOGGERS["csv"][0], "no_such_package"))
    with pytest.raises(FairlineError, match=r"pip install 'fairline\[csv\]'"), fl.log_to(["csv"], tmp_path):
        pass
    assert list(LOGGERS) == list(LOG_TOOLS)


def test_on_the_command_line(tmp_path, refused):
    ok(*TRAIN, "--log", "csv", "--out", tmp_path / "base")
    ok("linearize", tmp_path / "base", *LINEARIZE, "--log", "csv", "--out", tmp_path / "snl")
    ok("finetune", tmp_path / "snl", *FINETUNE, "--log", "csv", "--out", tmp_path / "students")
    told = {name: pd.read_csv(tmp_path / name / "logs/csv/metrics.csv") for name in ("base", "snl", "students")}
    accuracy = told["base"][told["base"]["name"] == "val_accuracy"]["value"].tolist()
    assert accuracy == pytest.approx(pd.read_parquet(tmp_path / "base/metrics.parquet")["val_accuracy"].tolist())
    # ReLUs are counted after the epoch.
    relus = told["snl"][told["snl"]["name"] == "relus"]["value"].astype(int).tolist()
    assert relus == pd.read_parquet(tmp_path / "snl/metrics.parquet")["relus"].astype(int).tolist()
    assert told["students"]["stage"].nunique() == 3
    assert "no logger 'excel'" in refused(*TRAIN, "--log", "excel", "--out", tmp_path / "other")
