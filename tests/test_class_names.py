"""Names of a user's own classes, also those that need quotes, in answers, tables and pages."""

import html
import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_study.core.classes import CLASSES
from cxr_study.core.run import Run, StudyError
from cxr_study.evaluate.csv_tables import evaluate
from cxr_study.evaluate.metrics import simulate

NEGATIVE, POSITIVE = 'kein Befund, "klar"', "Entzündung <rechts> \\1"
NAMES = (NEGATIVE, POSITIVE)


def finished_run(folder, classes):
    "A run with predictions of these classes"
    run = Run(folder).begin("02_training")
    run.write("predictions.csv", simulate(patients=60, images=1, seed=3))
    return run.finish(data=dict(dataset="films", classes=list(classes)), synthetic=True)


def test_answers_and_their_table_have_the_names(tmp_path):
    pytest.importorskip("onnxruntime")
    from cxr_study.serve.bundle import example_bundle
    from cxr_study.serve.predictor import Predictor, predict_files

    predictor = Predictor(example_bundle(tmp_path / "bundle", classes=NAMES))
    for number in range(4):
        grey = np.random.default_rng(number).integers(0, 80 * number + 1, (60, 60))
        Image.fromarray(grey.astype(np.uint8)).save(tmp_path / f"{number}.png")
    for logit in (-6.0, 6.0):
        answer = predictor.answer(logit)
        assert answer["decision"] == NAMES[logit > 0]
        assert answer["verdict"] in (*NAMES, "either class", "neither class")
        assert f"would show {POSITIVE}" in answer["frequency"]
        assert "pneumonia" not in answer["frequency"] + answer["operating_point"]["rule"]
    predict_files([*tmp_path.glob("*.png")], tmp_path / "out.csv", predictor, 1)
    table = pd.read_csv(io.StringIO((tmp_path / "out.csv").read_text()))
    assert len(table) == 4 and set(table.at_threshold) <= set(NAMES)
    assert not set(table.decision) & set(CLASSES)


def test_an_evaluation_shows_the_names(tmp_path):
    run = finished_run(tmp_path / "run", NAMES)
    shown, _ = evaluate([run.folder], tmp_path / "out", replicates=50)
    assert {f"F1, {name}" for name in NAMES} <= set(shown.metric)
    page = (tmp_path / "out/report.html").read_text()
    assert f"F1, {POSITIVE}" in html.unescape(page) and "<rechts>" not in page


def test_predictions_of_other_classes_are_not_compared(tmp_path):
    ours = finished_run(tmp_path / "ours", NAMES)
    theirs = finished_run(tmp_path / "theirs", ("healthy", "sick"))
    with pytest.raises(StudyError, match="distinguishes .* from .*, and .* healthy from sick"):
        evaluate([ours.folder, theirs.folder], tmp_path / "out", replicates=50)
    simulate(patients=60, images=1, seed=4).to_csv(tmp_path / "numbers.csv", index=False)
    both = [ours.folder, tmp_path / "numbers.csv"]
    shown, _ = evaluate(both, tmp_path / "both", replicates=50)
    assert f"F1, {POSITIVE}" in set(shown.metric)


def test_a_network_is_not_tested_on_other_classes(tmp_path):
    pytest.importorskip("torch")
    from cxr_study.data.sets import phantom
    from cxr_study.robust.other_hospital import external

    run = finished_run(tmp_path / "run", ("healthy", "sick"))
    with pytest.raises(StudyError, match="healthy from sick, and phantom NORMAL from PNEUMONIA"):
        external(run.folder, phantom(20))
    for name in ("ok", "ill"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("L", (20, 20)).save(tmp_path / "data" / name / "1.png")
    with pytest.raises(StudyError, match="there is no class 'sick'"):
        external(run.folder, tmp_path / "data")
