"""Sweeps and repeated runs on the command line, with a study of three small notebooks."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from conftest import COMMAND, ROOT, bare
from jupyter_core.utils import run_sync
from nbformat.v4 import new_code_cell, new_notebook

from cxr_study.core.options import parameters_cell
from cxr_study.core.run import Run, file_sha256
from cxr_study.pipeline.reproduce import compare_runs, reproduced
from cxr_study.pipeline.stages import _Kernel
from cxr_study.pipeline.sweep import SweepError, read_sweep

DATA = """
half = limit//2
table = pd.DataFrame(dict(
    image_id=[f"i{i}" for i in range(limit)],
    patient_id=[f"p{i//2}" for i in range(limit)],
    split=['val']*half + ['test']*(limit - half),
    label=[0, 1]*half,
))
run.write('split.csv', table)
run.write('data.json', dict(counts={}))
run.finish(data=dict(dataset=dataset, counts=dict(val=dict(all=half), test=dict(all=limit - half))), synthetic=True)"""
TRAINING = """
table = run.read('split.csv')
time.sleep(.3)
assert not clip or lr != clip, "the loss is not a number"
noise = np.random.default_rng(len(table)).normal(size=len(table))
run.write('predictions.csv', table.assign(logit=4*(table.label - .5) + noise*(1 - lr)))
run.finish()"""
EVALUATION = """
from cxr_study.evaluate.evaluation import evaluate_table
run.write('metrics.json', evaluate_table(run.read('predictions.csv'), replicates=50))
run.write('method.json', interval_method)
run.finish()"""
IMPORTS = """import time
import numpy as np, pandas as pd
from cxr_study.core.options import begin_stage"""
STAGES = {"01_data": DATA, "02_training": TRAINING, "03_evaluation": EVALUATION}


def project_of(tmp_path):
    "A function that calls the command line in a project of three quick notebooks"
    project = tmp_path / "project"
    (project / "nbs").mkdir(parents=True)
    (project / "settings.ini").touch()
    for name, code in STAGES.items():
        cells = [
            new_code_cell(IMPORTS),
            new_code_cell(
                parameters_cell(name).replace("limit = 0 ", "limit = 40"),
                metadata=dict(tags=["parameters"]),
            ),
            new_code_cell(f"run = begin_stage('{name}', run_dir, globals())" + code),
        ]
        nbformat.write(
            new_notebook(
                cells=cells,
                metadata=dict(
                    kernelspec=dict(name="python3", display_name="python3", language="python")
                ),
            ),
            project / f"nbs/{name}.ipynb",
        )

    def call(*args, expect=0, runs=tmp_path / "runs", start=False, **kwargs):
        how = dict(cwd=project, env=bare(tmp_path) | dict(CXR_RUNS=str(runs)), text=True)
        if start:
            return subprocess.Popen(
                [COMMAND, *map(str, args)],
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                **how,
            )
        done = subprocess.run([COMMAND, *map(str, args)], capture_output=True, timeout=300, **how)
        assert done.returncode == expect, done.stdout + done.stderr
        return done

    call.folder, call.project, call.runs = tmp_path, project, tmp_path / "runs"
    return call


@pytest.fixture
def study(tmp_path):
    return project_of(tmp_path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    "The folder of runs of a sweep of four that was not interrupted"
    study = project_of(tmp_path_factory.mktemp("undisturbed"))
    study("sweep", sweep_file(study), "--jobs", 2, "--threads", 1)
    return study.runs


def sweep_file(
    study,
    text="parameters: {dataset: phantom, limit: 40}\ngrid:\n  lr: [0.1, 0.2]\n  interval_method: [bca_t, bca]\n",
):
    (study.project / "sweep.yaml").write_text(text)
    return "sweep.yaml"


def entry_without_times(stage, entry):
    "An entry of a stage without its times; the report also without its key, which depends on the files"
    times = {"seconds", "finished"}
    left_out = times | {"key"} if stage == "report" else times
    return {name: value for name, value in entry.items() if name not in left_out}


def state(runs):
    "What a folder of runs holds, without times: run -> (bytes of its tables and JSON files, its manifest)"
    found = {}
    for path in sorted(Path(runs).glob("*/manifest.json")):
        run = Run(path.parent)
        names = sorted(run.manifest["artefacts"])
        entries = run.manifest["stages"].items()
        stages = {stage: entry_without_times(stage, entry) for stage, entry in entries}
        files = {n: run.path(n).read_bytes() for n in names if n.endswith((".csv", ".json"))}
        found[run.folder.name] = (files, dict(run.manifest, stages=stages, artefacts=names))
    return found


def wait_for(condition, seconds=120):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, f"not reached within {seconds} s"
        time.sleep(0.05)


def finished(runs):
    "Manifest of each run that has its report -> when it was written"
    return {
        p: p.stat().st_mtime_ns
        for p in sorted(Path(runs).glob("*/manifest.json"))
        if json.loads(p.read_text())["stages"].get("report", {}).get("key")
    }


def test_a_sweep_that_is_killed_and_resumed_ends_as_an_undisturbed_one(study, undisturbed):
    file = sweep_file(study)
    process = study("sweep", file, "--jobs", 1, "--threads", 1, start=True)
    wait_for(lambda: len(finished(study.runs)) >= 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = finished(study.runs)
    assert 2 <= len(before) < 4
    done = study("sweep", file, "--jobs", 1, "--threads", 1, "--json")
    assert [r["status"] for r in json.loads(done.stdout)["runs"]] == ["done"] * 4
    assert before.items() <= finished(study.runs).items(), "finished runs were written again"
    assert state(study.runs) == state(undisturbed)
    page = (study.runs / "sweeps/sweep/index.html").read_text()
    assert page.count("report.html") == 4 and "http" not in page and "SYNTHETIC" in page


def test_stages_are_shared_and_a_finished_run_is_never_repeated(study):
    file = sweep_file(
        study, "parameters: {dataset: phantom, limit: 40}\ngrid: {interval_method: [bca_t, bca]}\n"
    )
    plan = json.loads(study("sweep", file, "--dry-run", "--json").stdout)
    assert [(s["stage"], s["compute"]) for s in plan["stages"]] == [
        ("01_data", 1),
        ("02_training", 1),
        ("03_evaluation", 2),
    ]
    assert not list(study.runs.glob("*/manifest.json"))
    study("sweep", file, "--jobs", 2)
    trained = {
        Run(p.parent).manifest["stages"]["02_training"]["finished"]
        for p in study.runs.glob("*/manifest.json")
    }
    assert len(trained) == 1
    before = {p: p.stat().st_mtime_ns for p in study.runs.glob("*/manifest.json")}
    study(
        "sweep",
        sweep_file(
            study,
            "name: other\nparameters: {dataset: phantom, limit: 40}\ngrid: {interval_method: [bca]}\n",
        ),
        "--jobs",
        1,
    )
    assert {p: p.stat().st_mtime_ns for p in study.runs.glob("*/manifest.json")} == before


def test_a_failed_run_keeps_its_notebook_and_does_not_stop_the_others(study):
    file = sweep_file(
        study, "parameters: {dataset: phantom, limit: 40, clip: 0.2}\ngrid: {lr: [0.1, 0.2]}\n"
    )
    done = study("sweep", file, "--jobs", 1, "--json", expect=1)
    results = json.loads(done.stdout)["runs"]
    assert [r["status"] for r in results] == [
        "done",
        "failed",
    ] and "the loss is not a number" in results[1]["error"]
    notebook = nbformat.read(study.runs / results[1]["run"] / "notebooks/02_training.ipynb", 4)
    assert any(
        o.get("ename") == "AssertionError" for c in notebook.cells for o in c.get("outputs", [])
    )
    assert "failed" in (study.runs / "sweeps/sweep/index.html").read_text()


def predictions(runs):
    "Run -> bytes of its predictions"
    return {p.parent.name: p.read_bytes() for p in Path(runs).glob("*/predictions.csv")}


def test_a_dask_cluster_gives_the_same_and_a_killed_worker_loses_nothing(study, undisturbed):
    pytest.importorskip("distributed")
    file, port = sweep_file(study), 18786 + os.getpid() % 1000
    environment = bare(study.folder) | dict(
        CXR_RUNS=str(study.runs), DASK_DISTRIBUTED__WORKER__DAEMON="False"
    )

    def start(program, *args):
        return subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.{program}", *args],
            cwd=study.project,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    address = f"tcp://127.0.0.1:{port}"
    cluster = [
        start("dask_scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard")
    ]
    try:
        cluster += [
            start(
                "dask_worker",
                address,
                "--nworkers",
                "1",
                "--nthreads",
                "1",
                "--no-dashboard",
                "--no-nanny",
            )
            for _ in range(2)
        ]
        from distributed import Client

        with Client(address, timeout=60) as client:
            client.wait_for_workers(2, timeout=60)
        sweep = study("sweep", file, "--scheduler", address, "--threads", 1, start=True)
        wait_for(lambda: list(study.runs.glob("*/notebooks/02_training.ipynb")))
        os.killpg(cluster[1].pid, signal.SIGKILL)
        assert sweep.wait(timeout=200) == 0
        refused = study(
            "sweep", sweep_file(study), "--scheduler", address, expect=2, runs=Path("/proc/nowhere")
        )
        assert "/proc/nowhere cannot be written to" in refused.stderr
    finally:
        for process in cluster:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert len(predictions(study.runs)) == 4
    assert predictions(study.runs) == predictions(undisturbed)


@pytest.mark.parametrize(
    "text, line, says",
    [
        ("parameters:\n  dataset: phantom\ngrid:\n  lrr: [0.1]\n", 4, "did you mean 'lr'"),
        ("grid:\n  lr: [0.1,\n       ten]\n", 3, "should be of type float"),
        ("parameters:\n  seed: -1\n", 2, "seed=-1 must be at least 0"),
        ("parameters:\n\n  dataset: /lost/images\n", 3, "/lost/images"),
        ("grid: {lr: [0.1]}\nreference: {lr: 0.5}\n", 2, "no run of this sweep is the reference"),
        ("grid: [1]\n", 1, "name: value"),
        ("grid: {lr: [0.1]}\nruns: []\n", 2, "at least one configuration"),
        ("grid:\n  lr: [0.1\n", 3, "not YAML"),
        ("parameters:\n  seed: 1\n  seed: 2\n", 3, "given twice"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused_with_its_line(study, monkeypatch, text, line, says):
    monkeypatch.chdir(study.project)
    with pytest.raises(SweepError) as refused:
        read_sweep(sweep_file(study, text))
    assert f"sweep.yaml, line {line}:" in str(refused.value) and says in str(refused.value)


def test_the_command_says_all_mistakes_at_once_and_starts_nothing(study):
    done = study(
        "sweep",
        sweep_file(study, "parameters:\n  seed: -1\ngrid:\n  lr: [0.1,\n       ten]\n"),
        expect=2,
    )
    assert (
        "sweep.yaml, line 2: seed=-1" in done.stderr
        and "sweep.yaml, line 5" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert not study.runs.exists()


def test_a_read_only_folder_is_refused_before_the_first_run(study):
    done = study("sweep", sweep_file(study), expect=2, runs=Path("/proc/runs"))
    assert "/proc/runs cannot be written to" in done.stderr


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A copy of notebooks and library.

    `edit(file, old, new)` changes it; `changed()` names the stages whose key has changed since the last call.
    """
    folder = tmp_path_factory.mktemp("copy")
    for name in ("nbs", "cxr_study", "settings.ini"):
        source = ROOT / name
        shutil.copytree(
            source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "kernel-ipc*")
        ) if source.is_dir() else shutil.copy(source, folder / name)
    code = """
import json
from cxr_study.core.options import check_options
from cxr_study.pipeline.stages import stage_keys

keys = stage_keys(check_options({}), inputs='x')
print(json.dumps({name: key.key for name, key in keys.items()}))
"""

    def now():
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env=os.environ | dict(PYTHONPATH=str(folder)),
            capture_output=True,
            check=True,
        )
        return json.loads(done.stdout)

    class Keys:
        before = now()

        def edit(self, name, old, new):
            path = folder / name
            assert old in path.read_text(), (name, old)
            path.write_text(path.read_text().replace(old, new, 1))

        def changed(self):
            after = now()
            names = {name for name in after if after[name] != self.before[name]}
            self.before = after
            return names

    return Keys()


ALL = {
    "01_data",
    "02_training",
    "03_evaluation",
    "04_calibration",
    "05_explanation",
    "06_robustness",
    "07_serving",
}


@pytest.mark.parametrize(
    "file, old, new, stages",
    [
        (
            "nbs/02_training.ipynb",
            "Each epoch prints one line.",
            "Every epoch prints one line.",
            set(),
        ),  # Prose
        (
            "nbs/02_training.ipynb",
            "set_ylabel(\\\"Loss\\\")",
            "set_ylabel(\\\"Loss, nats\\\")",
            set(),
        ),  # A figure of training
        (
            "cxr_study/core/style.py",
            "def figure(",
            "def figure(unused=None, *, ",
            None,
        ),  # Style: whatever draws, not training
        (
            "cxr_study/data/audit.py",
            "def examine(",
            "def examine(unused, ",
            {"01_data"},
        ),  # The audit: its own stage, and none that follow
        ("cxr_study/evaluate/figures.py", "def roc_figure(", "def roc_figure(unused, ", None),
        (
            "cxr_study/train/recipe.py",
            "def make_learner(",
            "def make_learner(unused, ",
            None,
        ),  # Reached from the stage through training's relative import
        (
            "cxr_study/data/formats.py",
            "def read_bytes(",
            "def read_bytes(unused, ",
            ALL,
        ),  # Reached through images
    ],
)
def test_an_edit_reruns_the_stages_that_use_it_and_no_others(keys, file, old, new, stages):
    keys.edit(file, old, new)
    changed = keys.changed()
    if stages is not None:
        assert changed == stages
    elif "core/style" in file:
        assert changed and not {"02_training"} & changed
    elif "figures" in file:
        assert "03_evaluation" in changed and not {"01_data", "02_training"} & changed
    else:
        assert "02_training" in changed and "01_data" not in changed


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    "The folder of a finished run"
    study = project_of(tmp_path_factory.mktemp("one"))
    study("run", "--dataset", "phantom", "--limit", 40, "--run-dir", study.runs / "one")
    return study.runs / "one"


def test_a_run_is_reproduced_and_a_differing_package_is_named(study, one_run):
    shutil.copytree(one_run, study.runs / "one")
    manifest = study.runs / "one/manifest.json"
    manifest.write_text(
        manifest.read_text().replace(
            f'"numpy": "{__import__("numpy").__version__}"', '"numpy": "1.0.0"'
        )
    )
    done = study("reproduce", "one")
    assert "numpy was 1.0.0 and is" in done.stdout and re.search(
        r"identical +predictions\.csv", done.stdout
    )


def edit_artefact(run, name, text):
    "Write another text into a file of a run, and its checksum, as of a run with another outcome"
    run.path(name).write_text(text)
    run.manifest["artefacts"][name]["sha256"] = file_sha256(run.path(name))
    run.save_manifest()


def row_of(rows, name):
    return next(row for row in rows if row["artefact"] == name)


def test_another_logit_and_another_number_of_rows_are_differences(study, one_run):
    shutil.copytree(one_run, study.runs / "one")
    study("reproduce", "one")
    old = Run(study.runs / "one")
    new = Run(study.runs / "reproduced/one")
    *lines, last = old.path("predictions.csv").read_text().splitlines()
    other_logit = last.rsplit(",", 1)[0] + ",0.125\n"
    edit_artefact(old, "predictions.csv", "\n".join([*lines, other_logit]))
    rows = compare_runs(old, new)
    assert not reproduced(rows)
    assert row_of(rows, "predictions.csv")["words"].startswith("logit by up to")

    edit_artefact(old, "predictions.csv", "\n".join(lines) + "\n")
    done = study("reproduce", "one", "--json", expect=1)
    row = row_of(json.loads(done.stdout)["artefacts"], "predictions.csv")
    assert row["verdict"] == "differs" and row["apart"] is None
    assert row["words"].startswith("39 rows of")


def test_a_run_is_not_repeated_into_itself(study, one_run):
    shutil.copytree(one_run, study.runs / "one")
    before = (study.runs / "one/predictions.csv").stat().st_mtime_ns
    done = study("reproduce", "one", "--out", study.runs / "one", expect=2)
    assert "is the run itself" in done.stderr
    assert (study.runs / "one/predictions.csv").stat().st_mtime_ns == before


@pytest.mark.skipif(
    not list(ROOT.glob("results/first_edition/*/seed0/predictions.csv")),
    reason="no published results in this checkout",
)
def test_published_figures_follow_from_published_predictions(cli, tmp_path):
    "Metrics and figures in under a minute, with torch made unavailable"
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not to be used here')")
    started = time.time()
    done = cli(
        "reproduce",
        ROOT / "results/first_edition/pneumoniamnist-resnet18/seed0",
        "--from-predictions",
        "--json",
        check=False,
        PYTHONPATH=str(tmp_path),
    )
    found = json.loads(done.stdout)
    metrics = next(r for r in found["artefacts"] if r["artefact"] == "metrics.json")
    assert found["reproduced"] and metrics["apart"] <= 1e-12, (
        "another processor may add in another order, and that is all"
    )
    print(f"recomputed in {time.time() - started:.0f} s")


def test_a_summary_of_runs(undisturbed, study):
    done = study(
        "summarise",
        undisturbed,
        "--out",
        study.folder / "out",
        "--reference",
        "lr=0.1",
        "--reference",
        "interval_method=bca_t",
        "--json",
        "--replicates",
        100,
    )
    found = json.loads(done.stdout)
    assert (
        "interval_method bca_t, lr 0.2 - interval_method bca_t, lr 0.1:test.auc" in found["figures"]
    )
    means = pd.read_csv(study.folder / "out/arms.csv").query("split == 'val' and metric == 'auc'")
    highest = list(means.arm[means.value == means.value.max()])
    assert len(means) == 4 and found["best"] == (highest[0] if len(highest) == 1 else None), (
        "arms that differ in the interval alone share their AUC"
    )
    assert {p.name for p in (study.folder / "out").iterdir()} == {
        "runs.csv",
        "runs.parquet",
        "arms.csv",
        "comparisons.csv",
        "summary.json",
        "index.html",
        "figures",
    }
    assert "\x1b" not in done.stdout + done.stderr and "%|" not in done.stderr


def test_the_shell_completes(cli):
    assert "_CXR_STUDY_COMPLETE" in cli("completion", "zsh").stdout
    assert (
        "plain,sweep"
        in cli(
            _CXR_STUDY_COMPLETE="bash_complete", COMP_WORDS="cxr-study sw", COMP_CWORD="1"
        ).stdout
    )


NO_NETWORK = """
import socket, sys
asked = []
def refuse(*args, **kwargs):
    asked.append(args)
    raise OSError('a test has no network')
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from click.testing import CliRunner
from cxr_study.cli import main
done = CliRunner().invoke(main, ['sweep', sys.argv[1], '--dry-run'])
print(done.exit_code, len(asked), done.output)
"""


@pytest.mark.parametrize(
    'parameters, expected',
    (
        ('dataset: phantom, limit: 40, weights: imagenet, arch: tf_efficientnetv2_s', '0 0'),
        ('dataset: pneumoniamnist', '2 0'),
    ),
)
def test_a_dry_run_never_uses_the_network(tmp_path, parameters, expected):
    "Where weights are missing the plan is still made; a missing data set is a sentence"
    file = tmp_path / 'sweep.yaml'
    file.write_text(f'parameters: {{{parameters}}}\n')
    empty = dict(CXR_DATA=str(tmp_path), CXR_CACHE=str(tmp_path), CXR_RUNS=str(tmp_path / 'runs'))
    done = subprocess.run(
        [sys.executable, '-c', NO_NETWORK, file],
        capture_output=True,
        text=True,
        env=os.environ | empty,
    )
    assert done.stdout.startswith(expected), done.stdout + done.stderr
    assert ('No estimate yet' if expected == '0 0' else 'pneumoniamnist') in done.stdout


def test_an_estimate_comes_from_comparable_runs(study):
    "The same data, size and architecture; a sentence says from which run"
    file = sweep_file(study, 'parameters: {dataset: phantom, limit: 40, epochs: 2}\n')
    study('sweep', file)
    other = sweep_file(study, 'parameters: {dataset: phantom, limit: 40, seed: 7, epochs: 20}\n')
    said = study('sweep', other, '--dry-run').stdout
    assert re.search(r'Estimate: .* from the times of phantom-resnet18-seed0', said), said
    plan = json.loads(study('sweep', other, '--dry-run', '--json').stdout)['stages']
    assert all(len(row['comparable']) == 1 for row in plan if row['compute'])
    larger = sweep_file(study, 'parameters: {dataset: phantom, limit: 80, seed: 7}\n')
    assert 'No estimate yet' in study('sweep', larger, '--dry-run').stdout


# --- Kernels ---


def kernels_of(pid):
    "Numbers of the processes that are kernels of a process"
    found = []
    for file in Path('/proc').glob('[0-9]*/environ'):
        with contextlib.suppress(OSError):
            is_kernel = 'ipykernel' in file.with_name('cmdline').read_text()
            if is_kernel and f'JPY_PARENT_PID={pid}' in file.read_text(errors='replace').split(
                '\0'
            ):
                found.append(file.parent.name)
    return found


def parent_of(pid):
    "Number of the process that started another, None if it has ended; a kernel starts processes, too"
    with contextlib.suppress(OSError):
        return int(Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[1])


OPTIONS = ('run', '--dataset', 'phantom', '--limit', '40')


def test_stages_share_a_kernel_and_none_is_left(study):
    "One kernel for all stages; each sees nothing of the others, so that a sweep and single stages give the same"
    process = study(*OPTIONS, '--run-dir', study.runs / 'a', start=True)
    seen = set()
    while process.poll() is None:
        seen |= {kernel for kernel in kernels_of(process.pid) if parent_of(kernel) == process.pid}
        time.sleep(0.02)
    assert process.returncode == 0 and len(seen) == 1
    assert not kernels_of(process.pid)
    for notebook in (study.runs / 'a/notebooks').iterdir():
        cells = json.loads(notebook.read_text())['cells']
        counts = [cell['execution_count'] for cell in cells if cell['cell_type'] == 'code']
        assert counts == [*range(1, len(counts) + 1)], notebook.name


def test_a_kernel_that_died_between_two_stages_is_replaced(tmp_path):
    with contextlib.closing(_Kernel()) as kernel:
        first = kernel.ready(tmp_path)
        run_sync(first.shutdown_kernel)(now=True)
        second = kernel.ready(tmp_path)
        assert second is not first
        assert kernel.ready(tmp_path) is second


def test_a_kernel_that_does_not_start_is_a_sentence(study, monkeypatch):
    "Here because its package is broken; nothing waits for it"
    broken = study.folder / 'broken'
    broken.mkdir()
    (broken / 'ipykernel_launcher.py').write_text("raise ImportError('broken')")
    monkeypatch.setenv('PYTHONPATH', f"{broken}:{os.environ.get('PYTHONPATH', '')}")
    done = study(*OPTIONS, expect=1)
    assert "Stage 01_data failed. Its kernel died" in done.stderr


@pytest.mark.parametrize('how', ('fails', 'is killed'))
def test_a_run_that_ends_early_leaves_no_kernel(study, how):
    options = ('--clip', '0.002', '--lr', '0.002') if how == 'fails' else ()
    process = study(*OPTIONS, '--run-dir', study.runs / 'a', *options, start=True)
    if how == 'is killed':
        while not kernels_of(process.pid):
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    assert process.wait(120) != 0
    deadline = time.time() + 30
    while kernels_of(process.pid) and time.time() < deadline:
        time.sleep(0.1)
    assert not kernels_of(process.pid)
