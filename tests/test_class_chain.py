"""Films of two classes that a user names, from the folder to the service: every part speaks of these classes."""

import contextlib
import html
import json
import os
import re
import subprocess
import urllib.request
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from conftest import COMMAND, bare
from PIL import Image

from cxr_study.cli import main
from cxr_study.core.run import Run
from cxr_study.data.sets import phantom

for needed in ("torch", "onnxscript", "onnxruntime", "fastapi"):
    pytest.importorskip(needed, reason="needs the packages of the extras `train` and `serve`")

from load_client import post, running
from test_serving import in_study

TINY = ["--arch", "test_resnet", "--size", 32, "--epochs", 1, "--replicates", 100]
ASKED = {"accept": "application/dicom"}


def write_films(folder, names, drawn):
    "Files of the drawn images in a folder for each class"
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for row in np.flatnonzero(drawn.table.label == label):
            Image.fromarray(drawn.source(row)).save(folder / name / f"{row}.png")


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    "A folder with films, another hospital's, and a finished run; and a function that calls the command line there"
    folder = tmp_path_factory.mktemp("chain")
    write_films(folder / "films", ("healthy", "tb"), phantom(images=200, pixels=64))
    write_films(folder / "other", ("healthy", "tb"), phantom(images=60, seed=7, pixels=64))
    write_films(folder / "third", ("clear", "TBC"), phantom(images=60, seed=8, pixels=64))

    def call(*args, code=0):
        "What a command prints; it is called in this process, so that torch is imported once"
        with mock.patch.dict(os.environ, bare(folder), clear=True), contextlib.chdir(folder):
            done = CliRunner().invoke(main, [*map(str, args)])
        assert done.exit_code == code, done.output
        return done.output

    run = ["run", "--dataset", "films", "--positive", "tb", *TINY, "--run-dir", "run"]
    done = subprocess.run(
        [COMMAND, *map(str, run)],
        env=bare(folder),
        cwd=folder,  # Paths are relative to it
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, call


def shown_text(page):
    "What a page shows, with the texts of its pictures and without the list of options"
    page = re.sub(r"(?s)<(style|script)\b.*?</\1>", " ", page)
    alternatives = " ".join(re.findall(r'alt="([^"]*)"', page))
    return html.unescape(re.sub(r"<[^>]+>", " ", page) + alternatives)


def check_names(text, *names):
    "The text has these names, and none of the study's own"
    text = re.sub("(?i)pneumoniamnist", "", text)
    assert not re.search("(?i)pneumonia|NORMAL", text.replace("normalis", ""))
    for name in names:
        assert name in text, name


def notebook_outputs(path):
    "The text of a notebook's outputs"
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        for output in cell.get("outputs", []):
            texts = [output.get("text", ""), *output.get("data", {}).values()]
            parts += ["".join(text) for text in texts if not isinstance(text, dict)]
    return " ".join(part for part in parts if len(part) < 20_000)  # No pictures


def test_report_audit_card_and_stages_have_the_names(chain):
    folder, call = chain
    run = Run(folder / "run")
    assert run.manifest["data"]["classes"] == ["healthy", "tb"]
    for page in ("report.html", "audit.html"):
        check_names(shown_text(run.path(page).read_text()), "healthy", "tb")
    call("card", "run", "--out", "card.md")
    for card in (folder / "card.md", run.path("bundle/MODEL_CARD.md")):
        check_names(card.read_text(), "| split | healthy | tb |", "An image without tb")
    for notebook in sorted(run.path("notebooks").iterdir()):
        check_names(notebook_outputs(notebook))


def test_evaluation_summary_and_audit_have_the_names(chain):
    folder, call = chain
    check_names(call("evaluate", "run", "--out", "evaluated"), "F1, tb", "images of healthy")
    check_names(shown_text((folder / "evaluated/report.html").read_text()), "F1, tb")
    check_names(call("summarise", "run", "--out", "summary"))
    check_names(call("audit", "films", "--positive", "tb", "--out", "audit"), "% tb")


def test_a_bundle_answers_with_the_names(chain):
    folder, call = chain
    call("bundle", "run", "--out", "bundle")
    check_names(
        call("evaluate-bundle", "bundle", "--dataset", "other", "--out", "of_bundle"), "F1, tb"
    )
    call("predict", "other", "--bundle", "bundle", "--out", "p.csv")
    table = pd.read_csv(folder / "p.csv")
    assert len(table) == 60 and set(table.at_threshold) <= {"healthy", "tb"}
    refused = ["predict", "other", "--bundle", "bundle", "--out", "sr.csv", "--dicom-sr", "sr"]
    assert "distinguishes healthy from tb" in call(*refused, code=2)
    assert not (folder / "sr.csv").exists()


def test_another_hospital_has_the_same_classes(chain):
    folder, call = chain
    few = ["--replicates", 50]
    check_names(call("external", "run", "other", *few), " tb ")
    says = "distinguishes healthy from tb, and other tb from healthy"
    assert says in call("external", "run", "other", "--positive", "healthy", *few, code=2)
    says = "healthy from tb, and third clear from TBC"
    assert "there is no class 'tb'" in call("external", "run", "third", *few, code=2)
    assert says in call("external", "run", "third", "--positive", "TBC", *few)
    call("card", "run", "--out", "card.md")
    check_names((folder / "card.md").read_text(), says)


def test_the_service_answers_with_the_names(chain):
    folder, _ = chain
    film = in_study(phantom(images=1, pixels=64).source(0))
    with running(folder / "run/bundle", drain_seconds=0.2) as service:
        for path in ("/predict", "/explain"):
            status, body = post(service.url + path, film, "application/dicom")
            answer = json.loads(body)
            assert status == 200 and answer["decision"] in ("healthy", "tb")
            assert answer["model"]["classes"] == ["healthy", "tb"]
            assert "would show tb" in answer["frequency"]
        status, body = post(service.url + "/predict", film, "application/dicom", **ASKED)
        assert status == 406 and "healthy from tb" in json.loads(body)["detail"]
        document = json.loads(urllib.request.urlopen(service.url + "/openapi.json").read())
        assert document["components"]["schemas"]["Answer"]["properties"]["decision"]["enum"] == [
            "healthy",
            "tb",
        ]
        responses = document["paths"]["/predict"]["post"]["responses"]
        assert "406" in responses and "application/dicom" not in responses["200"]["content"]
        for path in ("/", "/docs", "/openapi.json", "/model"):
            text = urllib.request.urlopen(service.url + path).read().decode()
            if path == "/model":
                text = json.loads(text)["card"]
            check_names(shown_text(text), "tb")
