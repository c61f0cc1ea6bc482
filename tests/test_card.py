"""The model card is written from the run's files alone, and every committed card is up to date."""

import json
import re
import shutil

import pytest
from conftest import ROOT

from cxr_study.core.run import ManifestMismatch, StudyError, sha256
from cxr_study.evaluate.evaluation import quote
from cxr_study.pipeline.card import model_card, write_card
from cxr_study.serve.bundle import load_bundle

PUBLISHED = sorted(p.parent for p in (ROOT / "results").rglob("seed0/metrics.json"))
BUNDLES = sorted(p.parent for p in (ROOT / "models").glob("*/bundle.json"))
HEADINGS = (
    "Intended use",
    "Out of scope",
    "Training data",
    "Operating points",
    "Limits",
    "Ethical considerations",
)


def sections(card):
    "Heading -> text of a card"
    _, *parts = re.split(r"^## (.+)\n\n", card, flags=re.M)
    return {heading: text.rstrip("\n") for heading, text in zip(parts[::2], parts[1::2])}


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda p: "-".join(p.parts[-3:-1]))
def test_every_published_run_has_a_card(folder):
    text = model_card(folder)
    figures = json.loads((folder / "metrics.json").read_text())["figures"]
    for name in ("auc", "sensitivity@half", "specificity@half", "brier"):
        assert quote(figures[f"test.{name}"]) in text
    for heading in HEADINGS:
        assert f"## {heading}" in text
    assert "not a medical device" in text
    assert "Age, sex, origin and severity of each child were not released" in text


def test_committed_cards_are_up_to_date():
    for path in (ROOT / "results").rglob("MODEL_CARD.md"):
        assert path.read_text() == model_card(path.parent), path


def published_run(bundle):
    "The folder in results/ whose predictions a bundle names"
    predictions = (ROOT / "results").rglob("seed*/predictions.csv")
    wanted = bundle.facts["predictions_sha256"]
    (folder,) = [path.parent for path in predictions if sha256(path) == wanted]
    return folder


@pytest.mark.parametrize("folder", BUNDLES, ids=lambda p: p.name)
def test_the_card_of_a_bundle_is_that_of_its_published_run(folder):
    "Sections that need unpublished files are not compared; the data section may end with findings of the audit"
    bundle = load_bundle(folder)
    expected = sections(model_card(published_run(bundle)))
    found = sections(bundle.card)
    assert list(found) == list(expected)
    for heading, text in expected.items():
        if heading == "Training data":
            assert found[heading].startswith(text)
        elif "this folder" not in text.lower():
            assert found[heading] == text, heading
    limits = "\n".join(f"- {sentence}" for sentence in bundle.facts["limits"])
    assert found["Limits"] == limits


def test_the_shipped_bundle_is_made_again_byte_for_byte(data, tmp_path):
    "From its published run, with the packages that made it; `parity` is measured and may differ on other processors"
    from cxr_study.core.run import versions
    from cxr_study.data.cache import decoded
    from cxr_study.data.images import Preprocess
    from cxr_study.data.sets import load_dataset
    from cxr_study.pipeline.export import make_bundle

    (folder,) = BUNDLES
    shipped = load_bundle(folder)
    made_with = shipped.facts["made_with"]
    if versions(tuple(made_with)[1:]) != made_with:
        pytest.skip(f"the shipped bundle was made with {made_with}")
    run = published_run(shipped)
    spec = Preprocess.from_dict(json.loads((run / "preprocess.json").read_text()))
    decoded(load_dataset("chest_xray"), spec)
    made = make_bundle(run, tmp_path / "made")
    assert {file.name for file in made.iterdir()} == {file.name for file in folder.iterdir()}
    for file in made.iterdir():
        if file.name != "bundle.json":
            assert file.read_bytes() == (folder / file.name).read_bytes(), file.name
    facts = load_bundle(made).facts
    assert facts["parity"]["images_at_hand"]
    assert facts["parity"]["against"].keys() == shipped.facts["parity"]["against"].keys()
    measured = {"parity", "sha256"}
    assert {k: v for k, v in facts.items() if k not in measured} == {
        k: v for k, v in shipped.facts.items() if k not in measured
    }


def test_a_changed_figure_is_rejected(tmp_path):
    shutil.copytree(PUBLISHED[0], tmp_path / "run")
    before = write_card(tmp_path / "run").read_text()
    assert write_card(tmp_path / "run").read_text() == before
    file = tmp_path / "run" / "metrics.json"
    report = json.loads(file.read_text())
    report["figures"]["test.auc"]["value"] = 0.123456
    file.write_text(json.dumps(report))
    with pytest.raises(ManifestMismatch, match="metrics.json"):
        model_card(tmp_path / "run")
    with pytest.raises(StudyError, match="no manifest.json"):
        model_card(tmp_path)
