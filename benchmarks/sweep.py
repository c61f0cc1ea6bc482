"""Twelve runs on phantoms: one worker against two, killed half-way and resumed, and through a dask scheduler.

usage: python benchmarks/sweep.py [workers] [kill] [dask]      (default: all; results are printed, folders stay in
benchmarks/../cache/sweep)
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from cxr_study.core.run import Run, cache_folder

COMMAND, FOLDER = str(Path(sys.executable).parent / "cxr-study"), cache_folder() / "sweep"
SWEEP = """parameters:
  {dataset: phantom, limit: 120, size: 32, arch: test_resnet, epochs: 1, replicates: 100, promise_replicates: 100}
grid:
  seed: [0, 1]
  lr: [1e-3, 2e-3]
  operating_point: [half, youden, sensitivity_0.95]
"""


def start(runs, *args, log=None):
    "Start the sweep into a folder of runs"
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "sweep.yaml").write_text(SWEEP)
    return subprocess.Popen(
        [COMMAND, "sweep", FOLDER / "sweep.yaml", "--threads", "1", *args],
        env=os.environ | dict(CXR_RUNS=str(FOLDER / runs), CXR_CACHE=str(FOLDER / f"{runs}-cache")),
        start_new_session=True,
        stdout=open(FOLDER / f"{runs}.log", "a"),
        stderr=subprocess.STDOUT,
    )


def clear(runs):
    "No runs, and no images decoded before"
    for folder in (runs, f"{runs}-cache"):
        shutil.rmtree(FOLDER / folder, ignore_errors=True)


def fresh(runs, *args):
    "Seconds of the sweep into an empty folder"
    clear(runs)
    began = time.time()
    assert start(runs, *args).wait() == 0, f"see {FOLDER / runs}.log"
    return time.time() - began


def state(runs):
    "run -> file -> digest of what does not hold times"
    found = {}
    for path in sorted((FOLDER / runs).glob("*/manifest.json")):
        run = Run(path.parent)
        names = [
            n
            for n in run.manifest["artefacts"]
            if n.endswith((".csv", ".json", ".safetensors", ".png", ".svg", ".txt"))
            and n != "history.csv"
        ]
        found[run.folder.name] = {n: run.manifest["artefacts"][n]["sha256"] for n in names} | {
            "manifest": hashlib.sha256(
                json.dumps(
                    [
                        run.manifest["parameters"],
                        run.manifest["data"],
                        {n: e["key"] for n, e in run.manifest["stages"].items() if n != "report"},
                    ],
                    sort_keys=True,
                ).encode()
            ).hexdigest()
        }
    return found


def differing(a, b):
    return sorted(
        {
            f"{run}/{n}"
            for run in a | b
            for n in a.get(run, {}) | b.get(run, {})
            if a.get(run, {}).get(n) != b.get(run, {}).get(n)
        }
    )


def reports(runs):
    return {p.parent.name: p.stat().st_mtime_ns for p in (FOLDER / runs).glob("*/report.html")}


def workers():
    one, two = fresh("one", "--jobs", "1"), fresh("two", "--jobs", "2")
    print(
        f"one worker {one:.0f} s, two workers {two:.0f} s: {two / one:.2f}; "
        f"differing files: {differing(state('one'), state('two')) or 'none'}"
    )


def kill():
    if not reports("one"):
        fresh("one", "--jobs", "1")
    clear("killed")
    process = start("killed", "--jobs", "1")
    while len(reports("killed")) < 6 and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = reports("killed")
    assert start("killed", "--jobs", "1").wait() == 0
    repeated = [n for n, t in before.items() if reports("killed")[n] != t]
    print(
        f"killed after {len(before)} of 12 runs; repeated: {repeated or 'none'}; "
        f"differing files: {differing(state('killed'), state('one')) or 'none'}"
    )


def dask():
    if not reports("one"):
        fresh("one", "--jobs", "1")
    clear("dask")
    environment = os.environ | dict(
        CXR_RUNS=str(FOLDER / "dask"), CXR_CACHE=str(FOLDER / "dask-cache")
    )

    def run(*args):
        return subprocess.Popen(
            [sys.executable, "-m", *args],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    cluster = [
        run(
            "distributed.cli.dask_scheduler",
            "--host",
            "127.0.0.1",
            "--port",
            "18786",
            "--no-dashboard",
        )
    ]
    cluster += [
        run(
            "distributed.cli.dask_worker",
            "tcp://127.0.0.1:18786",
            "--nworkers",
            "1",
            "--nthreads",
            "1",
            "--no-dashboard",
            "--no-nanny",
        )
        for _ in range(2)
    ]
    try:
        time.sleep(8)
        process = start("dask", "--scheduler", "tcp://127.0.0.1:18786")
        while not reports("dask") and process.poll() is None:
            time.sleep(0.1)
        os.killpg(cluster[1].pid, signal.SIGKILL)
        code = process.wait()
    finally:
        for p in cluster:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(p.pid, signal.SIGKILL)
    print(
        f"dask, one of two workers killed after the first run: exit code {code}, {len(reports('dask'))} runs; "
        f"differing files: {differing(state('dask'), state('one')) or 'none'}"
    )


if __name__ == "__main__":
    for name in sys.argv[1:] or ("workers", "kill", "dask"):
        globals()[name]()
