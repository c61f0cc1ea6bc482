"""Trackers are off unless asked for; what they store is what was trained, read back from a local store."""

import os

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("fastai")

from fastai.vision.all import DataLoaders, Learner, TfmdDL
from torch import nn

from cxr_study.core.tracking import tracker
from cxr_study.train.recipe import TrackerCallback
from cxr_study.train.training import Training, _facts

EPOCHS = 2


@pytest.fixture
def fitted(tmp_path, monkeypatch):
    "A function that fits a line with a tracker, and returns the losses that fastai recorded"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXR_RUNS", str(tmp_path / "runs"))

    def fit(kind):
        monkeypatch.setenv("CXR_TRACK", kind)
        x = np.linspace(-1, 1, 16, dtype=np.float32)[:, None]
        items = [(a, 2 * a) for a in x]
        loaders = [TfmdDL(items, bs=8, num_workers=0) for _ in range(2)]
        found = tracker("a line", _facts(Training("resnet18", seed=3)))
        cbs = [TrackerCallback(found)] if found else []
        learn = Learner(DataLoaders(*loaders), nn.Linear(1, 1), loss_func=nn.MSELoss(), cbs=cbs)
        with learn.no_bar(), learn.no_logging():
            learn.fit(EPOCHS, 0.01)
        return [float(row[1]) for row in learn.recorder.values]

    return fit


def test_nothing_is_tracked_unless_asked_for(fitted, tmp_path):
    assert len(fitted("")) == EPOCHS
    assert list(tmp_path.iterdir()) == []


def test_mlflow_has_parameters_epochs_and_the_history(fitted, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    losses = fitted("mlflow")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("cxr_study")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["arch"] == "resnet18" and run.data.params["seed"] == "3"
    stored = client.get_metric_history(run.info.run_id, "valid_loss")
    assert [m.step for m in stored] == list(range(EPOCHS))
    assert [m.value for m in stored] == pytest.approx(losses)
    kept = client.download_artifacts(run.info.run_id, "history.csv", str(tmp_path))
    assert pd.read_csv(kept).valid_loss.tolist() == pytest.approx(losses)


def test_tensorboard_has_the_epochs(fitted, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    losses = fitted("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "runs/tensorboard/a line"))
    events.Reload()
    stored = events.Scalars("valid_loss")
    assert [event.step for event in stored] == list(range(EPOCHS))
    assert [event.value for event in stored] == pytest.approx(losses)
    assert "parameters/text_summary" in events.Tags()["tensors"]


def test_trackio_has_the_epochs(fitted, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    losses = fitted("trackio")
    (run,) = trackio.Api().runs("cxr_study")
    assert run.name == "a line"
    assert os.listdir(tmp_path / "trackio")
    rows = trackio.SQLiteStorage.get_logs("cxr_study", "a line")
    stored = [row["valid_loss"] for row in rows if "valid_loss" in row]
    assert stored == pytest.approx(losses)
