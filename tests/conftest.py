"""What several tests share: the command line as a person uses it, and real data where it is at hand."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMAND = str(Path(sys.executable).parent / "cxr-study")


@pytest.fixture(scope="module", autouse=True)
def _passed_over_by_garbage_collection():
    "Objects of torch, fastai and earlier tests, which collections would go through again and again"
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # Some libraries report objects that are left at the end


@pytest.fixture(scope="session")
def data():
    "Folder with the real data sets; without CXR_DATA the test is skipped"
    folder = os.environ.get("CXR_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip(
            "needs real data: set CXR_DATA to the folder that holds pneumoniamnist/, chest_xray/, ..."
        )
    return Path(folder).resolve()


def bare(folder):
    "An environment without data at hand and without a network, with runs and cache of its own below `folder`"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("CXR_")}
    return clean | dict(
        CXR_RUNS=str(folder / "runs"),
        CXR_CACHE=str(folder / "cache"),
        NO_COLOR="1",
        MPLBACKEND="agg",
        http_proxy="http://127.0.0.1:9",
        https_proxy="http://127.0.0.1:9",
    )


@pytest.fixture
def cli(tmp_path):
    "Call `cxr-study` as a process in a bare environment"

    def call(*args, timeout=600, check=True, **env):
        done = subprocess.run(
            [COMMAND, *map(str, args)],
            env=bare(tmp_path) | env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    return call


SLOW = ("batch", "serving", "study", "training", "repository", "class_chain", "card", "results")


def pytest_collection_modifyitems(items):
    "Files that take longest come first, so that two workers end together"

    def place(item):
        name = item.path.stem.removeprefix("test_")
        return SLOW.index(name) if name in SLOW else len(SLOW)

    items.sort(key=place)
