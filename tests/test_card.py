"""The model card: from the run's files alone, and up to date wherever one is kept."""

import json
import shutil

import pytest
from conftest import ROOT

from cxr_study.core.run import ManifestMismatch, StudyError
from cxr_study.evaluate.evaluation import quote
from cxr_study.pipeline.card import model_card, write_card

PUBLISHED = sorted(p.parent for p in (ROOT / "results").glob("*/seed0/metrics.json"))
CARDS = sorted(p for place in ("models", "results") for p in (ROOT / place).rglob("MODEL_CARD.md"))


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda p: p.parent.name)
def test_every_published_run_has_a_card(folder):
    text, figures = model_card(folder), json.loads((folder / "metrics.json").read_text())["figures"]
    for name in ("auc", "sensitivity@half", "specificity@half", "brier"):
        assert quote(figures[f"test.{name}"]) in text
    for heading in (
        "Intended use",
        "Out of scope",
        "Training data",
        "Operating points",
        "Limits",
        "Ethical considerations",
    ):
        assert f"## {heading}" in text
    assert (
        "not a medical device" in text
        and "Age, sex, origin and severity of each child were not released" in text
    )


@pytest.mark.parametrize("path", CARDS, ids=lambda p: str(p.parent.relative_to(ROOT)))
def test_kept_cards_are_what_their_run_gives(path):
    if not (path.parent / "manifest.json").exists():
        pytest.skip("a bundle: its card is proven with it")
    assert path.read_text() == model_card(path.parent)


def test_another_figure_gives_another_card_or_is_refused(tmp_path):
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
