"""Files that come from elsewhere, and disks that cannot be written: nothing leaves its folder, and each failure is one
sentence."""

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import papermill
import pytest
from click.testing import CliRunner
from conftest import COMMAND, ROOT, bare
from papermill.exceptions import PapermillExecutionError

from cxr_study.cli import main
from cxr_study.core import run as core
from cxr_study.core.options import check_options
from cxr_study.core.run import Run, StudyError, sha256
from cxr_study.pipeline import stages
from cxr_study.pipeline.card import model_card
from cxr_study.pipeline.published import check_published
from cxr_study.pipeline.report import report_html
from cxr_study.pipeline.reproduce import reproduce
from cxr_study.pipeline.stages import finished_stages, take_over
from cxr_study.pipeline.study import calibrate_run
from cxr_study.pipeline.sweep import SweepError, read_sweep
from cxr_study.serve import bundle as bundles
from cxr_study.serve.bundle import BundleError, example_bundle, load_bundle, write_bundle
from cxr_study.serve.predictor import Predictor, predict_files

SECRET = b"a private key"
NAMES = [
    "../secret",
    "figures/../../secret",
    "{absolute}",
    "link/secret",
    "secret_link",
    "..",
    ".",
    "",
]


@pytest.fixture
def foreign(tmp_path):
    "A function that makes a run whose manifest names a file outside it, with the right checksum"
    (tmp_path / "secret").write_bytes(SECRET)

    def make(name):
        run = Run(tmp_path / "runs/foreign")
        run.begin("02_training", lr=0.1)
        run.write("predictions.csv", pd.DataFrame(dict(image_id=["a"])))
        run.finish(data=dict(dataset="x"), synthetic=True)
        (run.folder / "link").symlink_to(tmp_path)
        (run.folder / "secret_link").symlink_to(tmp_path / "secret")
        name = name.format(absolute=tmp_path / "secret")
        run.manifest["artefacts"][name] = dict(sha256=sha256(SECRET), stage="02_training")
        run.manifest["stages"]["02_training"] |= dict(key="k", passed="k")
        run.save_manifest()
        return run.folder

    return make


def copies(folder):
    "Files below a folder with the content that must not be copied, links left out"
    files = [p for p in Path(folder).rglob("*") if p.is_file() and not p.is_symlink()]
    return [p for p in files if p.read_bytes() == SECRET and "link" not in p.parts]


OPERATIONS = dict(
    verify=lambda run, out: Run(run),
    calibrate=lambda run, out: calibrate_run(run, {}, out),
    reproduce=lambda run, out: reproduce(run, out, predictions=True, say=str),
    card=lambda run, out: model_card(run),
    published=lambda run, out: check_published(run),
    take_over=lambda run, out: take_over(
        out, "02_training", run, json.loads((run / "manifest.json").read_text())
    ),
    report=lambda run, out: report_html(Run(run, verify=False)),
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_manifest_cannot_name_a_file_outside_its_run(foreign, tmp_path, operation, name):
    folder = foreign(name)
    try:
        OPERATIONS[operation](folder, tmp_path / "out")
    except StudyError as error:
        assert "leads out of the folder" in str(error) or "is not there" in str(error)
    else:  # Neither reads the files of the run
        assert operation in ("report", "published") and "link" in name
    assert copies(tmp_path) == [tmp_path / "secret"]
    assert (tmp_path / "secret").read_bytes() == SECRET


def test_a_sound_run_is_not_refused(tmp_path):
    run = Run(tmp_path / "run").begin("01_data")
    run.write("figures/a..b/..c.json", 1)
    run.write("with space, 'quotes' and ü.json", 2)
    run.finish()
    assert len(Run(tmp_path / "run").manifest["artefacts"]) == 2


@pytest.mark.parametrize("name", ["../victim", "{absolute}", "..", ""])
def test_a_manifest_cannot_choose_where_it_is_repeated(tmp_path, monkeypatch, name):
    "`reproduce` replaces an earlier repetition, so the name of a run must not lead to another folder"
    monkeypatch.setenv("CXR_RUNS", str(tmp_path / "runs"))
    victim = Run(tmp_path / "runs/victim").begin("01_data")
    victim.write("precious.json", 1)
    victim.finish()
    run = Run(tmp_path / "foreign").begin("01_data")
    run.manifest["run"] = name.format(absolute=victim.folder)
    run.finish()
    with pytest.raises(StudyError, match="leads out of the folder"):
        reproduce(tmp_path / "foreign", say=str)
    assert victim.path("precious.json").is_file()


def test_a_foreign_manifest_does_not_hide_the_runs_beside_it(foreign, tmp_path):
    foreign("../secret")
    (tmp_path / "runs/damaged").mkdir()
    (tmp_path / "runs/damaged/manifest.json").write_text("[1, 2")
    own = Run(tmp_path / "runs/own").begin("01_data").finish()
    own.manifest["stages"]["01_data"]["key"] = "mine"
    own.save_manifest()
    assert list(finished_stages(tmp_path / "runs")) == [("01_data", "mine")]


def test_the_cache_of_a_run_is_one_of_the_caches(tmp_path, monkeypatch):
    from cxr_study.data.splits import open_data

    monkeypatch.setenv("CXR_CACHE", str(tmp_path / "cache"))
    run = Run(tmp_path / "run").begin("01_data")
    run.write("split.csv", pd.DataFrame(columns=["image_id", "patient_id", "split", "label"]))
    run.write("data.json", dict(cache="../elsewhere", cache_sha256="", tolerated={}))
    run.finish()
    with pytest.raises(StudyError, match="leads out of the folder"):
        open_data(run)


# --- Links


class Addresses(HTMLParser):
    "Collects every address and every element of a page"

    def __init__(self, text):
        super().__init__()
        self.addresses, self.elements = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.addresses += [v for k, v in attrs if k in ("href", "src", "action") and tag != "img"]
        assert not any(k.startswith("on") for k, _ in attrs)


HOSTILE = [
    "javascript:alert(1)",
    "JaVaScRiPt:alert(1)",
    "data:text/html,<script>alert(1)</script>",
    "vbscript:x",
    'a"onclick="alert(1)',
    "<script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "<javascript:alert(1)>",
    "file:etc",
]


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory):
    "A published run whose texts and file names are hostile"
    source = next(iter(sorted(ROOT.glob("results/first_edition/*/seed0"))))
    folder = tmp_path_factory.mktemp("hostile") / "run"
    shutil.copytree(source, folder)
    run = Run(folder, verify=False)
    listed = run.manifest["artefacts"]
    run.manifest["artefacts"] = {n: e for n, e in listed.items() if run.path(n).is_file()}
    entry = dict(sha256="0" * 64, stage="03_evaluation")
    for text in HOSTILE:
        run.manifest["artefacts"][text] = entry
        run.manifest["artefacts"][f"notebooks/{text}"] = entry
        run.manifest["parameters"][text] = text
        run.manifest["versions"][text] = text
    run.manifest["run"] = " ".join(HOSTILE)
    run.manifest["data"]["dataset"] = " ".join(HOSTILE)
    run.manifest["data"].setdefault("provenance", {})["publisher"] = " ".join(HOSTILE)
    return run


def test_links_of_a_report_are_web_addresses_or_relative(hostile_run):
    page = Addresses(report_html(hostile_run))
    assert len(page.addresses) > len(HOSTILE)
    for address in page.addresses:
        assert address.startswith(("http://", "https://", "#")) or (
            ":" not in address and not address.startswith(("/", "\\"))
        ), address
    assert "script" not in page.elements


def test_a_card_has_no_html_and_links_to_the_web_alone(hostile_run):
    hostile_run.save_manifest()
    card = model_card(hostile_run.folder)
    assert "<script" not in card and "<javascript" not in card
    assert not re.search(r"(?<!\\)\](?=\((?!https?://)|:)", card) and "alert(1)" in card


# --- Bundles


def network(size=32):
    import onnx

    return onnx.load_from_string(bundles.brightness_onnx(size))


def external(tensor, keys=("location",)):
    "Let a tensor have its values in another file"
    from onnx import TensorProto

    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key in keys:
        entry = tensor.external_data.add()
        entry.key, entry.value = key, "../weights.bin"


def in_initializer(model):
    external(model.graph.initializer[0])


def in_constant(model):
    from onnx import TensorProto, helper

    tensor = helper.make_tensor("t", TensorProto.FLOAT, [1], [1.0])
    model.graph.node.insert(0, helper.make_node("Constant", [], ["unused"], value=tensor))
    external(model.graph.node[0].attribute[0].t, ("offset", "location"))


def in_subgraph(model):
    from onnx import TensorProto, helper

    tensor = helper.make_tensor("t", TensorProto.FLOAT, [1], [1.0])
    external(tensor)
    graph = helper.make_graph([], "inner", [], [], [tensor])
    model.graph.node.append(helper.make_node("If", ["c"], ["d"], then_branch=graph))


def in_function(model):
    from onnx import TensorProto, helper

    tensor = helper.make_tensor("t", TensorProto.FLOAT, [1], [1.0])
    external(tensor)
    node = helper.make_node("Constant", [], ["y"], value=tensor)
    opset = helper.make_opsetid("", 17)
    model.functions.append(helper.make_function("d", "f", [], ["y"], [node], [opset]))


@pytest.mark.parametrize("place", [in_initializer, in_constant, in_subgraph, in_function])
def test_a_network_with_weights_in_other_files_is_refused(tmp_path, monkeypatch, place):
    model = network()
    place(model)
    content = model.SerializeToString()
    facts = json.loads((example_bundle(tmp_path / "sound") / "bundle.json").read_text())
    del facts["files"], facts["sha256"], facts["schema"], facts["notice"]
    with pytest.raises(BundleError, match="names other files"):
        write_bundle(tmp_path / "refused", content, "card", **facts)
    with monkeypatch.context() as unchecked:  # As another program would write it, with right hashes
        unchecked.setattr(bundles, "checked_onnx", lambda onnx: onnx)
        write_bundle(tmp_path / "foreign", content, "card", **facts)
    with pytest.raises(BundleError, match="names other files"):
        Predictor(tmp_path / "foreign")
    Predictor(tmp_path / "sound")


def test_the_published_hash_is_that_of_the_shipped_bundle():
    "After another bundle is shipped, its SHA-256 belongs into `PUBLISHED` and on the front page"
    shipped = {p.parent.name: load_bundle(p.parent) for p in ROOT.glob("models/*/bundle.json")}
    assert {name: bundle.sha256 for name, bundle in shipped.items()} == bundles.PUBLISHED
    for digest in bundles.PUBLISHED.values():
        assert digest in (ROOT / "README.md").read_text()


def resealed(source, target):
    "A copy of a bundle with another threshold and a right hash of its own"
    shutil.copytree(source, target)
    facts = json.loads((target / "bundle.json").read_text())
    facts["calibration"]["operating_points"][0]["threshold"] += 0.1
    facts["sha256"] = bundles._content_hash(facts)
    (target / "bundle.json").write_text(core.to_json(facts))


def test_a_resealed_bundle_is_not_taken_for_the_published_one(tmp_path, monkeypatch):
    name = next(iter(bundles.PUBLISHED))
    resealed(ROOT / "models" / name, tmp_path / "models" / name)
    monkeypatch.setattr(bundles, "root", lambda: tmp_path)
    with pytest.raises(BundleError, match="not the bundle that this version ships"):
        load_bundle(tmp_path / "models" / name)
    shutil.copytree(tmp_path / "models" / name, tmp_path / "own")
    assert "was not published" in bundles.origin(load_bundle(tmp_path / "own"))


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts.pop("preprocess"),
        lambda facts: facts.update(preprocess=[]),
        lambda facts: facts.update(calibration=dict(calibrator=3)),
        lambda facts: facts.update(files=[1]),
        lambda facts: facts.update(files={"model.onnx": 3}),
    ],
)
def test_a_sealed_bundle_of_another_form_is_a_sentence(tmp_path, change):
    folder = example_bundle(tmp_path / "bundle")
    facts = json.loads((folder / "bundle.json").read_text())
    change(facts)
    facts["sha256"] = bundles._content_hash(facts)
    (folder / "bundle.json").write_text(json.dumps(facts))
    with pytest.raises(StudyError):
        load_bundle(folder)


# --- Sweeps


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "..", ""])
def test_a_sweep_cannot_choose_a_folder_elsewhere(tmp_path, name):
    file = tmp_path / "sweep.yaml"
    file.write_text(f"parameters: {{dataset: phantom}}\nname: {json.dumps(name)}\n")
    with pytest.raises(SweepError, match="line 2: .* leads out of the folder"):
        read_sweep(file)


BOMBS = {
    "tag": "a: !!python/object/apply:os.system ['touch pwned']\n",
    "own tag": "parameters: !thing {a: 1}\n",
    "aliases": "a: &a [x, x]\nb: &b [*a, *a]\n" + "c: [*b, *b]\n" * 2000,
    "depth": "[" * 50_000,
    "block depth": "- " * 5_000 + "1\n",
    "size": "#" * 2_000_000,
    "digits": "parameters: {lr: " + "9" * 100_000 + "}\n",
    "grid": "grid: {"
    + ", ".join(f"{n}: [{', '.join(map(str, range(100)))}]" for n in ("seed", "epochs", "limit"))
    + "}\n",
    "self": "parameters: &p {<<: *p}\n",
    "two": "--- {}\n--- {}\n",
    "bytes": "\x00",
    "key": "? [1, 2]\n: 3\n",
    "date": "parameters: {lr: 2020-01-01}\n",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_hostile_sweep_is_refused_at_once(tmp_path, bomb):
    file = tmp_path / "sweep.yaml"
    file.write_text(BOMBS[bomb])
    started = time.process_time()
    done = CliRunner().invoke(main, ["sweep", str(file), "--dry-run"])
    assert done.exit_code == 2 and re.match(r"Error: (A sweep of|sweep.yaml)", done.output)
    assert time.process_time() - started < 10
    assert not Path("pwned").exists()


def test_a_sweep_that_is_no_text_is_a_sentence(tmp_path):
    (tmp_path / "sweep.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SweepError, match="cannot be read as a text"):
        read_sweep(tmp_path / "sweep.yaml")


# --- One run does not replace another


def test_a_folder_with_another_run_is_refused(tmp_path):
    values = check_options(dict(dataset="phantom", lr=0.2))
    folder = tmp_path / "run"
    stages.check_run_folder(folder, values, "")
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    stages.check_run_folder(folder, values, "")
    run = Run(folder).begin("01_data", dataset="phantom")
    run.finish()
    stages.check_run_folder(folder, values, "")  # One that was interrupted goes on
    Run(folder).begin("02_training", lr=0.1, removed_option=3).finish()
    before = (folder / "manifest.json").read_bytes()
    command = ["run", "--dataset", "phantom", "--lr", "0.2", "--run-dir", str(folder)]
    done = CliRunner().invoke(main, command)
    one_sentence(done, "other options: lr 0.1, now 0.2", "--overwrite")
    other = Run(tmp_path / "other").begin("02_training", lr=0.2)
    other.finish()
    with pytest.raises(StudyError, match="holds a run with other options"):
        calibrate_run(other.folder, {}, folder)
    with pytest.raises(StudyError, match="holds another run"):
        reproduce(other.folder, folder, say=str)
    assert (folder / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("kind", ["evaluation", "predictions"])
def test_a_folder_with_other_results_is_refused(tmp_path, kind):
    folder = tmp_path / "results"
    if kind == "evaluation":
        Run(folder).begin("evaluation", paths=[]).finish()
    else:
        folder.mkdir()
        (folder / "predictions.csv").write_text("mine")
    done = CliRunner().invoke(main, ["run", "--dataset", "phantom", "--run-dir", str(folder)])
    one_sentence(done, "results that are not of a run")


def test_a_repetition_may_be_repeated(tmp_path, monkeypatch):
    from cxr_study.pipeline import reproduce as module

    run = Run(tmp_path / "one").begin("02_training")
    run.finish()
    monkeypatch.setattr(module, "_rerun", lambda old, out, say: ([], []))
    for _ in range(2):
        reproduce(run.folder, tmp_path / "again", say=str)
    Run(tmp_path / "two").begin("02_training").finish()
    with pytest.raises(StudyError, match="holds another run"):
        reproduce(tmp_path / "two", tmp_path / "again", say=str)


# --- Two processes, one table


def test_two_predictions_into_one_table_follow_each_other(tmp_path):
    from PIL import Image

    folder, out = tmp_path / "in", tmp_path / "out.csv"
    folder.mkdir()
    for i in range(12):
        Image.new("L", (40, 40), 20 * i).save(folder / f"{i:02}.png")
    predictor = Predictor(example_bundle(tmp_path / "bundle"))
    counts, said = [], []

    def predict():
        def slowly(path, answer):
            time.sleep(0.02)

        counts.append(predict_files([folder], out, predictor, 2, slowly, said.append))

    threads = [threading.Thread(target=predict) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    files = [line.split(",")[0] for line in out.read_text().splitlines()[1:]]
    assert sorted(files) == sorted(str(p) for p in folder.iterdir())
    assert sorted(c["before"] for c in counts) == [0, 12, 12]
    assert sum("Waiting for another process" in sentence for sentence in said) == 2


# --- Disks


def one_sentence(done, *texts):
    "Check that a command ended with exit code 2 and one sentence, which holds these texts"
    output = done.output if hasattr(done, "output") else done.stdout + done.stderr
    code = done.exit_code if hasattr(done, "exit_code") else done.returncode
    lines = [line for line in output.splitlines() if line.startswith(("Error", "Traceback"))]
    assert code == 2 and len(lines) == 1 and "Traceback" not in output, output
    for text in texts:
        assert text in lines[0], output


ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
}


@pytest.fixture(params=ERRORS, ids=lambda number: errno.errorcode[number])
def broken_disk(request, monkeypatch):
    "A function that lets a function of a module fail; returns the reason that is shown"

    def fail(*args, **kwargs):
        raise OSError(request.param, os.strerror(request.param), "a file")

    def break_at(module, name):
        monkeypatch.setattr(module, name, fail)
        return ERRORS[request.param]

    break_at.number = request.param
    return break_at


def published_copy(tmp_path):
    run = tmp_path / "runs" / "one"
    shutil.copytree(next(iter(sorted(ROOT.glob("results/first_edition/*/seed0")))), run)
    return run


def test_a_card_on_a_broken_disk_is_a_sentence(tmp_path, broken_disk):
    run = published_copy(tmp_path)
    reason = broken_disk(os, "replace")
    done = CliRunner().invoke(main, ["card", str(run)])
    one_sentence(done, "MODEL_CARD.md", reason)


def test_clean_up_on_a_read_only_disk_hides_nothing(tmp_path, broken_disk):
    reason = broken_disk(os, "replace")
    broken_disk(Path, "unlink")
    done = CliRunner().invoke(main, ["card", str(published_copy(tmp_path))])
    one_sentence(done, "MODEL_CARD.md", reason)


def finished_training(folder):
    run = Run(folder).begin("02_training")
    run.write("predictions.csv", pd.DataFrame(dict(image_id=["a"])))
    run.finish(data=dict(dataset="phantom"), synthetic=True)
    run.manifest["stages"]["02_training"] |= dict(key="k", passed="k")
    run.save_manifest()
    return run


def test_calibrate_on_a_broken_disk_is_a_sentence(tmp_path, broken_disk):
    run = finished_training(tmp_path / "runs/one")
    reason = broken_disk(os, "replace")
    done = CliRunner().invoke(main, ["calibrate", str(run.folder)])
    one_sentence(done, reason)


def test_copying_a_run_on_a_broken_disk_is_a_sentence(tmp_path, broken_disk):
    run = finished_training(tmp_path / "runs/one")
    broken_disk(shutil, "copy2")
    done = CliRunner().invoke(main, ["calibrate", str(run.folder), "--out", str(tmp_path / "o")])
    one_sentence(done, "ermission is denied" if broken_disk.number == errno.EACCES else "annot")


def test_a_stage_on_a_broken_disk_is_a_sentence(tmp_path, broken_disk):
    reason = broken_disk(papermill, "execute_notebook")
    options = ["run", "--dataset", "phantom", "--run-dir", str(tmp_path / "runs/one")]
    one_sentence(CliRunner().invoke(main, options), "Cannot write", reason)


@pytest.mark.parametrize("number", ERRORS)
def test_a_kernel_on_a_broken_disk_is_a_sentence(tmp_path, number):
    "The kernel's own error, or the sentence that `atomic_write` made of it"
    error = OSError(number, os.strerror(number), "a file")
    notebook = tmp_path / "notebooks/01_data.ipynb"
    sentence = PapermillExecutionError(
        0, 1, "", "WriteError", str(core.write_error("x", error)), []
    )
    raw = PapermillExecutionError(0, 1, "", "OSError", str(error), [])
    for failure in (sentence, raw):
        found = stages._stage_failed("01_data", notebook, failure)
        if failure is raw and number == errno.EACCES:  # It may be about a file that is read
            assert isinstance(found, stages.StageFailed)
        else:
            assert isinstance(found, core.WriteError) and ERRORS[number] in str(found)
    other = PapermillExecutionError(0, 1, "", "ValueError", "no number", [])
    assert isinstance(stages._stage_failed("01_data", notebook, other), stages.StageFailed)


def test_a_library_that_hides_a_full_disk_is_seen_through(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with pytest.raises(RuntimeError), core.atomic_write(tmp_path / "a"):
        raise RuntimeError("file write failed")
    monkeypatch.setattr(core.shutil, "disk_usage", lambda path: usage._replace(free=0))
    with (
        pytest.raises(core.WriteError, match="the disk is full"),
        core.atomic_write(tmp_path / "a"),
    ):
        raise RuntimeError("file write failed")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "(folder with images, bundle)"
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for i in range(20):
        Image.new("L", (40, 40), 10 * i).save(folder / f"{i:02}.png")
    return folder, example_bundle(tmp_path_factory.mktemp("bundle"))


def limit_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))


def predict_command(pictures, out):
    folder, bundle = pictures
    return ["predict", folder, "--bundle", bundle, "--out", out]


def call(tmp_path, *args, **kwargs):
    return subprocess.run(
        [COMMAND, *map(str, args)],
        env=bare(tmp_path),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        **kwargs,
    )


def test_predict_stops_with_a_sentence_and_continues(tmp_path, pictures):
    "The limit for the size of a file stops the table in the middle of a row"
    out = tmp_path / "out.csv"
    stopped = call(tmp_path, *predict_command(pictures, out), preexec_fn=limit_files)
    one_sentence(stopped, str(out), "larger than the limit")
    assert 0 < out.stat().st_size <= 1024
    call(tmp_path, *predict_command(pictures, out))
    rows = out.read_text().splitlines()[1:]
    assert len({row.split(",")[0] for row in rows}) == len(rows) == 20


@pytest.mark.parametrize("unbuffered", ["1", ""])
def test_a_full_standard_output_is_a_sentence(tmp_path, pictures, unbuffered):
    "Whether it is written at once or at the end"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [COMMAND, *map(str, predict_command(pictures, tmp_path / "out.csv"))],
            env=bare(tmp_path) | dict(PYTHONUNBUFFERED=unbuffered),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2 and "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(params=["size=64k", "ro"])
def small_disk(request, tmp_path):
    "A folder on a disk that is almost full, or read-only"
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", request.param, "tmpfs", disk]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    if request.param != "ro":
        (disk / "filler").write_bytes(bytes(60 * 1024))
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_commands_on_a_real_disk_that_cannot_be_written(small_disk, tmp_path, pictures):
    run = published_copy(tmp_path)
    commands = [
        ["card", run, "--out", small_disk / "card.md"],
        predict_command(pictures, small_disk / "a/out.csv"),
        ["calibrate", finished_training(tmp_path / "runs/two").folder, "--out", small_disk / "c"],
        ["run", "--dataset", "phantom", "--limit", "60", "--run-dir", small_disk / "r"],
        ["evaluate", run / "predictions.csv", "--replicates", "10", "--out", small_disk / "e"],
    ]
    for command in commands:
        one_sentence(CliRunner().invoke(main, list(map(str, command))), "annot")
