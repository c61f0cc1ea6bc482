"The published runs of the second edition: their files and the plan's calibration"

import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.numpy import load_file

sys.path.insert(0, str(ROOT / "tools"))
from publish_second_edition import EDITION, POINT, network_of
from second_edition_films import VERSIONS
from second_edition_rule import criterion

from cxr_study.core.run import Run
from cxr_study.predict.decision import Calibration, sigmoid

RUNS = sorted(p.parent for p in EDITION.glob("*/seed*/predictions.csv"))
each_run = pytest.mark.parametrize("folder", RUNS, ids=lambda p: p.parent.name)


@each_run
def test_a_run_is_whole(folder):
    "Every file of the manifest is there, so that commands take the folder as a run; large weights have 16 bits"
    run = Run(folder)
    weights = load_file(run.path("model.safetensors"))
    large = {v.dtype.name for v in weights.values() if v.size > 2**14}
    assert large == {"float16"}
    assert run.manifest["training"]["criterion_c"] > 0
    assert run.stage("02_training")["hardware"]["device"].startswith("NVIDIA")


@each_run
def test_calibrator_and_threshold_are_those_of_the_plan(folder):
    "They follow from the GPU's validation logits"
    network = network_of(folder)
    calibration = Calibration.from_dict(Run(folder).read("calibration.json"))
    slope, intercept = network.line(0)
    assert calibration.calibrator.kind == "platt" and calibration.in_use == POINT
    parameters = calibration.calibrator.parameters
    assert parameters == pytest.approx(dict(slope=slope, intercept=intercept))
    assert calibration.point().threshold == pytest.approx(float(sigmoid(network.threshold(0))))


@each_run
def test_stored_weights_give_the_decisions_of_the_trained_ones(folder):
    run = Run(folder)
    table = run.read("predictions.csv").set_index("image_id")
    calibration = Calibration.from_dict(run.read("calibration.json"))
    network = network_of(folder)
    parts = {"val/plain": network.val(0), "test/1": network.test}
    assert sum(map(len, parts.values())) == len(table)
    for name, films in parts.items():
        here = table.logit.loc[films.image_id].to_numpy()
        there = network.raw(0, name)
        assert np.abs(here - there).max() < 0.1
        assert (calibration.decide(here) == calibration.decide(there)).mean() > 0.997


def test_the_network_to_ship_has_the_lowest_criterion_of_those_with_weights():
    "Section 9 of the plan"
    found = {}
    for weights in EDITION.glob("chest_xray-*/seed*/model.safetensors"):
        network = network_of(weights.parent)
        versions = {v: network.raw(0, f"val/{v}") for v in VERSIONS}
        found[weights.parent] = criterion(versions, network.val(0)).mean()
    assert len(found) > 1
    assert min(found, key=found.get) == EDITION / "chest_xray-tf_efficientnetv2_b0/seed0"


WEIGHTS = sorted(p.parent for p in EDITION.glob("*/seed*/model.safetensors"))


@pytest.mark.parametrize("folder", WEIGHTS, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_weights_in_half_precision_give_the_published_logits(folder, data, tmp_path):
    "On every tenth test film"
    from second_edition_films import Films

    from cxr_study.data.images import Preprocess
    from cxr_study.train.networks import Classifier, create_body
    from cxr_study.train.training import predict_logits

    network = network_of(folder)
    (job,) = [entry["job"] for entry in network.jobs]
    films = Films(tmp_path, job["data"])
    rows = films.table().query("fold == -2").row.to_numpy()[::10]
    model = Classifier(create_body(job["arch"]), Preprocess(job["size"], standardise="image"))
    stored = load_file(folder / "model.safetensors")
    model.load_state_dict({name: torch.tensor(v).float() for name, v in stored.items()})
    images = films.images(job["size"], job["geometry"])[rows]
    logits = predict_logits(model.eval(), images, np.arange(len(images)), 32, "cpu")
    assert np.abs(logits - network.raw(0, "test/1")[::10]).max() < 0.1
