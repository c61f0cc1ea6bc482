"""A whole study on the command line: all notebooks through papermill, one run folder."""

import os
import re
import shutil
import signal
import subprocess
import threading
import time

import numpy as np
import pandas as pd
import pytest
from conftest import COMMAND, ROOT, bare
from PIL import Image

from cxr_study.core.run import ManifestMismatch, Run

SMALL = ["--dataset", "phantom", "--limit", 300, "--epochs", 2, "--replicates", 200]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A small finished run on phantoms and what the command printed"
    folder = tmp_path_factory.mktemp("study")
    done = subprocess.run(
        [COMMAND, "run", *map(str, SMALL), "--run-dir", str(folder / "run")],
        env=bare(folder),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, Run(folder / "run"), done.stdout + done.stderr


def test_a_run_leaves_everything_it_promised(finished):
    folder, run, printed = finished
    assert f"Report: {run.path('report.html')}" in printed and "epoch 1/1" in printed
    for name in (
        "split.csv",
        "predictions.csv",
        "history.csv",
        "metrics.json",
        "calibration.json",
        "model.safetensors",
        "report.html",
    ):
        assert name in run.manifest["artefacts"]
    for name in (
        "misclassified_examples.png",
        "confusion_matrix.png",
        "roc_curve.png",
        "loss_acc_auc.txt",
    ):
        assert run.path(f"outputs/{name}").stat().st_size
    assert not run.path("checkpoint.pt").exists()
    assert {p.name for p in run.path("notebooks").iterdir()} == {
        f"{s}.ipynb" for s in run.manifest["stages"] if s != "report"
    }


def test_the_manifest_says_what_the_run_stood_on(finished):
    manifest = finished[1].manifest
    assert manifest["synthetic"] is True and manifest["data"]["dataset"] == "phantom"
    assert (
        len(manifest["data"]["split_sha256"]) == 64 and len(manifest["data"]["cache_sha256"]) == 64
    )
    assert {"python", "torch", "fastai", "numpy"} <= set(manifest["versions"])
    assert manifest["parameters"]["epochs"] == 2 and all(
        s["seconds"] > 0 for s in manifest["stages"].values() if s["parameters"]
    )
    assert {"commit", "dirty"} == set(manifest["stages"]["02_training"]["git"])


def test_the_report_needs_nothing_else(finished):
    page = finished[1].path("report.html").read_text()
    assert "SYNTHETIC" in page and "not a medical device" in page and "ROC-AUC" in page
    assert page.count("data:image/png;base64,") >= 4 and "http" not in page.split("<style>")[0]
    auc = finished[1].read("metrics.json")["figures"]["test.auc"]["value"]
    assert f"{auc:.3f}" in page


def test_a_second_call_runs_nothing_again(finished):
    folder, run, _ = finished
    before = run.path("predictions.csv").stat().st_mtime_ns
    done = subprocess.run(
        [COMMAND, "run", *map(str, SMALL), "--run-dir", str(run.folder)],
        env=bare(folder),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.count("done before") == len(run.manifest["stages"]) - 1, (
        done.stdout + done.stderr
    )
    assert run.path("predictions.csv").stat().st_mtime_ns == before


def test_a_changed_file_is_named(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished[1].folder, copy)
    (copy / "predictions.csv").write_text(
        (copy / "predictions.csv").read_text().replace("test", "val", 1)
    )
    (copy / "history.csv").unlink()
    with pytest.raises(ManifestMismatch) as mismatch:
        Run(copy)
    assert "history.csv (missing)" in str(mismatch.value)
    assert "predictions.csv (changed)" in str(mismatch.value)


def until_stage_is_done(command, stage, environment, seconds=600):
    "Start a command and stop it when it has finished this stage; what it printed until then"
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    stop = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
    stop.start()
    printed = ""
    for line in process.stdout:
        printed += line
        if re.search(rf"{stage}: \d+ s", line):
            break
    else:
        raise AssertionError(printed)
    stop.cancel()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return printed


@pytest.mark.parametrize("command", ["summarise", "reproduce", "card", "calibrate"])
def test_an_edited_prediction_is_no_result_of_the_run(finished, tmp_path, cli, command):
    "Whatever reads a run's results refuses a table that is not the one its manifest describes"
    copy = tmp_path / "copy"
    shutil.copytree(finished[1].folder, copy)
    table = pd.read_csv(copy / "predictions.csv", dtype=str)
    table.loc[0, "logit"] = "9.5"
    table.to_csv(copy / "predictions.csv", index=False)
    done = cli(command, copy, check=False, timeout=120)
    assert done.returncode == 2 and "predictions.csv (changed)" in done.stderr


def test_killed_and_resumed_equals_undisturbed(finished, tmp_path):
    "The same seed in another folder, killed in training and resumed, gives the same predictions bit for bit"
    folder, run, _ = finished
    command = [COMMAND, "run", *map(str, SMALL), "--run-dir", str(tmp_path / "run")]
    process = subprocess.Popen(
        command,
        env=bare(tmp_path),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.time() + 300
    while (
        not (tmp_path / "run/checkpoint.pt").exists()
        and time.time() < deadline
        and process.poll() is None
    ):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / "run/checkpoint.pt").exists(), (
        "training was to be interrupted after its first epoch"
    )
    printed = until_stage_is_done(command, "02_training", bare(tmp_path))
    assert "01_data: done before" in printed and "Resuming after epoch" in printed
    assert (tmp_path / "run/predictions.csv").read_bytes() == run.path(
        "predictions.csv"
    ).read_bytes()


@pytest.mark.parametrize(
    "args, says",
    [
        (["--epohs", "3"], "--epochs"),
        (["--epochs", "many"], "not a valid integer"),
        (["--dataset", "chest_xrai"], "chest_xray"),
        (["--dataset", "/nowhere/images"], "/nowhere/images"),
        (["--dataset", "phantom", "--arch", "resnet81"], "resnet18"),
        (["--dataset", "phantom", "--weights", "lost.safetensors"], "lost.safetensors"),
        (["--dataset", "phantom", "--augment", "flip"], "standard"),
        (["--dataset", "phantom", "--run-dir", "/proc/run"], "/proc"),
        (["--dataset", "phantom", "--lr", "inf"], "finite number"),
        (["--dataset", "phantom", "--prevalences", "0.1,x"], "between 0 and 1"),
        (["--dataset", "phantom", "--prevalences", "5,10"], "between 0 and 1"),
        (["--dataset", ""], "is not allowed"),
        (["--dataset", "x" * 5000], "is neither a data set"),
        (["--dataset", "~nobody-here/images"], "is neither a data set"),
        (["--dataset", "phantom", "--weights", "x" * 5000], "nor a file that exists"),
        (["--dataset", "phantom", "--run-dir", "x" * 5000], "too long"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(cli, tmp_path, args, says):
    done = cli("run", *args, check=False, timeout=120)
    assert (
        done.returncode == 2
        and says in done.stderr
        and "Traceback" not in done.stderr + done.stdout
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("inside", ["CXR_RUNS", "CXR_CACHE", "--run-dir"])
def test_nothing_is_written_beside_the_classes_of_a_data_set(cli, tmp_path, inside):
    "A folder of runs or of the cache would be a third class in the next run"
    images = tmp_path / "images"
    for name in ("normal", "pneumonia"):
        (images / name).mkdir(parents=True)
        for number in range(6):
            pixels = np.random.default_rng(number).integers(0, 255, (40, 40), np.uint8)
            Image.fromarray(pixels).save(images / name / f"{name}{number}.png")
    folder = str(images / "written")
    args = ["--run-dir", folder] if inside == "--run-dir" else []
    settings = {inside: folder} if inside.startswith("CXR") else {}
    done = cli("run", "--dataset", str(images), *args, check=False, timeout=120, **settings)
    assert done.returncode == 2 and "taken for a class" in done.stderr
    assert not (images / "written").exists()


def test_pneumoniamnist_without_data_or_network_fails_at_once(cli, tmp_path):
    started = time.time()
    done = cli("run", "--dataset", "pneumoniamnist", check=False)
    assert time.time() - started < 15 and done.returncode == 2  # 5 s on an idle machine
    assert "CXR_DATA" in done.stderr and "looked" in done.stderr.lower()
    assert not list(tmp_path.rglob("*.npz"))


def test_imagenet_weights_that_cannot_be_had_name_the_choices(cli):
    done = cli("run", *SMALL, "--weights", "imagenet", check=False)
    assert done.returncode != 0 and "CXR_WEIGHTS" in done.stderr and "weights=none" in done.stderr


def test_a_full_disk_is_a_sentence_and_leaves_nothing_half_written(tmp_path):
    from cxr_study.core.run import StudyError

    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        run = Run(disk / "run").begin("01_data")
        with pytest.raises(StudyError, match="disk is full"):
            run.write("split.csv", pd.DataFrame(np.random.rand(50_000, 4)))
        assert [p.name for p in (disk / "run").iterdir()] == ["manifest.json"]
    finally:
        subprocess.run(["umount", disk], check=True)
