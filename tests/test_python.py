"""What a stranger calls: a cheap `import cxr_study`, a bundle that is found or fetched, a split with whole patients."""

import functools
import http.server
import json
import subprocess
import sys
import threading

import pytest
from conftest import ROOT, bare

import cxr_study
from cxr_study.serve import bundle as bundles
from cxr_study.serve.bundle import BundleError, example_bundle, find_bundle, load_bundle

NAME = "brightness"


def python(code, **kwargs):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **kwargs
    )


def test_every_public_name_is_there_and_documented():
    assert set(cxr_study.__all__) <= set(dir(cxr_study))
    page = (ROOT / "nbs/howto/python.ipynb").read_text()
    for name in cxr_study.__all__:
        assert getattr(cxr_study, name).__name__ == name
        assert f"`{name}(" in page
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        cxr_study.nothing  # noqa: B018


def test_import_loads_nothing_that_is_heavy():
    "Of the standard library it takes importlib alone; `load` needs neither torch nor pandas nor scikit-learn"
    heavy = "{'torch', 'fastai', 'sklearn', 'pandas', 'scipy', 'matplotlib'} & set(sys.modules)"
    code = f"""
import sys
import cxr_study
assert 'numpy' not in sys.modules
from cxr_study import load
assert not {heavy}, {heavy}
"""
    done = python(code, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def release(tmp_path, monkeypatch):
    "A server with the release's archives, and a library that publishes the example bundle"
    folder = example_bundle(tmp_path / "made" / NAME)
    site = tmp_path / "site" / f"v{cxr_study.__version__}"
    site.mkdir(parents=True)
    command = [sys.executable, "-m", "zipfile", "-c", site / f"{NAME}.zip", folder]
    subprocess.run(command, check=True)
    handler = functools.partial(Quiet, directory=tmp_path / "site")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    elsewhere = tmp_path / "empty"
    elsewhere.mkdir()
    monkeypatch.setattr(bundles, "root", lambda: elsewhere)
    monkeypatch.setattr(bundles, "PUBLISHED", {NAME: load_bundle(folder).sha256})
    monkeypatch.setattr(bundles, "_RELEASE", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("CXR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXR_BUNDLE", raising=False)
    yield site / f"{NAME}.zip"
    server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.mark.parametrize("name", [None, NAME])
def test_a_published_bundle_is_fetched_once(release, name):
    found = find_bundle(name)
    assert load_bundle(found).sha256 == bundles.PUBLISHED[NAME]
    release.unlink()
    assert find_bundle(name) == found
    assert sorted(p.name for p in found.iterdir()) == ["MODEL_CARD.md", "bundle.json", "model.onnx"]


def another(folder):
    "The archive of a sound bundle that is not the published one"
    return example_bundle(folder / NAME, size=64)


def incomplete(folder):
    path = example_bundle(folder / NAME)
    (path / "model.onnx").unlink()
    return path


def renamed(folder):
    return example_bundle(folder / "other")


@pytest.mark.parametrize("made", [another, incomplete, renamed])
def test_an_archive_with_something_else_is_refused(release, tmp_path, made):
    content = made(tmp_path / "foreign")
    command = [sys.executable, "-m", "zipfile", "-c", release, content]
    subprocess.run(command, check=True)
    with pytest.raises(BundleError, match="did not give it"):
        find_bundle(NAME)
    assert not list((tmp_path / "cache").rglob("bundle.json"))


class Cut(Quiet):
    "A server that closes the connection in the middle of a file, until `whole` is set"

    whole = False

    def copyfile(self, source, outputfile):
        content = source.read()
        outputfile.write(content if Cut.whole else content[: len(content) // 2])


def test_a_download_that_breaks_off_is_started_again(release, tmp_path, monkeypatch, capsys):
    handler = functools.partial(Cut, directory=release.parents[1])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(bundles, "_RELEASE", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(Cut, "whole", False)
    with pytest.raises(BundleError, match="did not give it") as caught:
        find_bundle(NAME)
    assert caught.value.__suppress_context__  # A sentence, without the errors of four libraries
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix != ".lock"][2:]
    Cut.whole = True
    assert load_bundle(find_bundle(NAME)).sha256 == bundles.PUBLISHED[NAME]
    server.shutdown()


def test_without_a_network_the_choices_are_named(release):
    release.write_bytes(b"no archive")
    with pytest.raises(BundleError, match="did not give it: File is not a zip file"):
        find_bundle()
    release.unlink()
    with pytest.raises(BundleError) as caught:
        find_bundle()
    for choice in ("Name the folder of a bundle", "CXR_BUNDLE", NAME, "cxr-study bundle RUN"):
        assert choice in str(caught.value)


def test_three_lines_in_an_empty_folder(tmp_path):
    "A path is enough; the answer is that of the command line"
    from PIL import Image

    Image.new("L", (60, 40), 120).save(tmp_path / "film.png")
    folder = example_bundle(tmp_path / "bundle")
    code = f"""
from cxr_study import load
print(load({str(folder)!r}).predict('film.png').answer['logit'])
"""
    environment = bare(tmp_path) | dict(PYTHONPATH=str(ROOT))
    done = python(code, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "cxr_study", "predict", "film.png", "--bundle", folder]
    subprocess.run([*command, "--json"], cwd=tmp_path, env=environment, check=True)
    assert done.stdout.strip() in (tmp_path / "predictions.csv").read_text()


STUDY = {  # Packages that only the extra `study` installs, and the module of each
    "grad-cam": "pytorch_grad_cam",
    "scikit-image": "skimage",
    "ruamel.yaml": "ruamel",
}


HIDE = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec


def find_spec(name, path=None, target=None):
    return None if name.partition('.')[0] in hidden else find(name, path, target)


PathFinder.find_spec = find_spec
from cxr_study.cli import main

main()
"""


@pytest.fixture
def without_study(tmp_path):
    "Calls `cxr-study` as it is after `pip install 'cxr-study[evaluate]'`: what else `study` brings is hidden"
    from test_package import requirements

    extras = requirements()
    there = {r.name for extra in ("", "evaluate") for r in extras[extra]} | {"joblib"}
    names = {r.name for r in extras["study"]} - there
    hidden = sorted(STUDY.get(name, name) for name in names)
    assert {"torch", "pyarrow", "papermill"} <= set(hidden)
    (tmp_path / "hide.py").write_text(f"hidden = {hidden}\n{HIDE}")

    def call(*args, code=0):
        done = subprocess.run(
            [sys.executable, tmp_path / "hide.py", *map(str, args)],
            cwd=tmp_path,
            env=bare(tmp_path) | dict(PYTHONPATH=str(ROOT)),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return call


def test_what_needs_no_torch_needs_no_package_of_the_study(without_study, tmp_path):
    "Of the commands, those that the README names; the others name the extra that they need"
    from PIL import Image

    seed = ROOT / "results/first_edition/pneumoniamnist-resnet18/seed0"
    Image.new("L", (60, 40), 120).save(tmp_path / "film.png")
    without_study("evaluate", seed, "--replicates", 100)
    printed = without_study("summarise", seed, "--replicates", 20)
    assert "auc" in printed and "None" not in printed  # What one seed cannot give is a dash
    assert (tmp_path / "summary/runs.csv").is_file()
    without_study("card", seed, "--out", "card.md")
    without_study("predict", "film.png", "--bundle", example_bundle(tmp_path / "bundle"))
    for name in ("normal", "pneumonia"):
        (tmp_path / "films" / name).mkdir(parents=True)
        for i in range(12):
            shade = 20 * i + (name == "normal")
            Image.new("L", (60, 40), shade).save(tmp_path / "films" / name / f"{i}.png")
    without_study("audit", "films")
    for command in (["run", "--dataset", "phantom"], ["sweep", "x.yaml"], ["bundle", seed]):
        assert "pip install 'cxr-study[study]'" in without_study(*command, code=2)


def test_fastai_splits_by_patient(tmp_path):
    "A DataBlock with files, and one with a table; RandomSplitter separates images of patients"
    pytest.importorskip("fastai")
    import pandas as pd
    from fastai.data.block import DataBlock
    from fastai.data.transforms import RandomSplitter

    from cxr_study import PatientSplitter

    files = [f"person{i // 4}_{i}.jpeg" for i in range(80)]
    table = pd.DataFrame(dict(file=files, patient=[f.partition("_")[0] for f in files]))

    def patients(dataset, column=False):
        items = dataset.items.patient if column else [f.partition("_")[0] for f in dataset.items]
        return set(items)

    def split(items, splitter):
        return DataBlock(splitter=splitter).datasets(items)

    by_file = split(files, PatientSplitter(lambda f: f.partition("_")[0], seed=3))
    assert len(by_file.valid) == 16
    assert not patients(by_file.train) & patients(by_file.valid)
    by_row = split(table, PatientSplitter("patient", seed=3))
    assert not patients(by_row.train, True) & patients(by_row.valid, True)
    random = split(files, RandomSplitter(seed=3))
    assert patients(random.train) & patients(random.valid)


def test_evaluation_in_python_is_that_of_the_command_line(tmp_path):
    from cxr_study import evaluate_predictions
    from cxr_study.evaluate.csv_tables import evaluate
    from cxr_study.evaluate.metrics import simulate
    from cxr_study.predict.decision import sigmoid

    table = simulate(patients=60, seed=4)
    table["probability"] = sigmoid(table.logit)
    columns = ["label", "probability", "patient_id"]
    table[columns].to_csv(tmp_path / "t.csv", index=False)
    evaluate([tmp_path / "t.csv"], tmp_path / "out", replicates=200)
    written = json.loads((tmp_path / "out/metrics.json").read_text())["figures"]
    found = evaluate_predictions(table.label, table.probability, table.patient_id, replicates=200)
    for name in ("auc", "brier"):
        entry = written[f"test.{name}"]
        assert found[name].value == pytest.approx(entry["value"])
        assert found[name].lower == pytest.approx(entry["lower"])
