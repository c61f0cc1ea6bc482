"""The HTML pages: self-contained, legible, with the user's class names, and without unfounded claims."""

import io
import re
from html import unescape

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from cxr_study.core.pages import PAGES_FOLDER, render
from cxr_study.core.run import Run
from cxr_study.data.audit import auc_interval, confounded, shift_title, shortcut_title, write_audit
from cxr_study.data.sets import load_dataset, phantom
from cxr_study.evaluate.csv_tables import evaluate
from cxr_study.evaluate.metrics import simulate
from cxr_study.pipeline.report import (
    FIGURES,
    POPULATION_LIMIT,
    PUBLIC_TEST_LIMIT,
    limit_sentences,
    report_html,
)
from cxr_study.predict.decision import sigmoid

OTHERS = (
    "pneumonia",
    "normal",
    "kermany",
    "kaggle",
    "pneumoniamnist",
    "chest_xray",
)  # Nothing that a page on classes of one's own may name


def words_of(page):
    "What a person reads of a page"
    text = re.sub(r"<style>.*?</style>", "", page, flags=re.S)
    return unescape(re.sub(r"<[^>]+>", " ", text))


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    "A function that writes a folder of drawn images, so many a class, in classes of other names"
    drawn = phantom(images=400)

    def write(each):
        folder = tmp_path_factory.mktemp("own") / "films"
        for label, name in enumerate(("healthy", "sick")):
            (folder / name).mkdir(parents=True)
            rows = np.flatnonzero(drawn.table.label == label)[:each]
            assert len(rows) == each
            for row in rows:
                Image.fromarray(drawn.source(row)).save(folder / name / f"{row}.png")
        return folder

    return write


# --- the skeleton ---


def luminance(colour):
    "Relative luminance of a colour such as #1b1b1b (WCAG)"
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_has_enough_contrast_on_light_and_dark_screens():
    style = (PAGES_FOLDER / "style.css").read_text()
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6})", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.S)[:2]
    )
    assert set(light) == set(dark) and light["page"] != dark["page"]
    for colours in (light, dark):
        for text in ("text", "soft", "accent", "grave"):
            assert contrast(colours[text], colours["page"]) >= 4.5, (text, colours)
        for below in ("panel", "notice"):
            assert (
                contrast(colours["text"], colours[below]) >= 4.5
                and contrast(colours["soft"], colours["panel"]) >= 4.5
            )


@pytest.mark.parametrize("name", ["report", "audit", "evaluation", "sweep"])
def test_every_page_is_whole_and_escapes_what_it_is_given(name):
    page = render(
        name,
        heading="<script>alert(1)</script>",
        notices=["a & b"],
        sections=[dict(heading="<b>", text=["<i>"])],
    )
    assert (
        page.startswith("<!doctype html>")
        and "color-scheme" in page
        and "@media print" in page
        and "width=device-width" in page
    )
    assert (
        "<script" not in page
        and "&lt;script&gt;" in page
        and "a &amp; b" in page
        and "&lt;i&gt;" in page
    )
    assert (
        not re.search(r"""(src|href)=["']?(https?:)?//""", page)
        and "@import" not in page
        and "url(" not in page
    )


# --- the audit ---


def test_an_audit_shows_the_names_of_the_classes(own, tmp_path):
    folder = own(140)
    assert load_dataset(folder, "sick").classes == ("healthy", "sick")
    facts = write_audit(folder, tmp_path, positive="sick")
    assert facts["classes"] == dict(healthy=140, sick=140) and set(facts["counts"]["test"]) == {
        "healthy",
        "sick",
    }
    assert {row["class"] for row in facts["shift"]} == {"healthy", "sick"} and any(
        row["split"] == "test" for row in facts["shortcuts"]
    )
    texts = (
        words_of((tmp_path / "audit.html").read_text()),
        (tmp_path / "datasheet.md").read_text(),
        (tmp_path / "audit.json").read_text(),
    )
    for text in texts:
        assert "healthy" in text and "sick" in text
        assert [word for word in OTHERS if word in text.lower()] == []
    assert "| split | healthy | sick |" in texts[1] and "not tested" not in texts[0]


def test_an_audit_of_few_images_says_that_it_tested_nothing(own, tmp_path):
    facts = write_audit(own(12), tmp_path, positive="sick")
    assert (
        facts["shift"] == [] and [row for row in facts["shortcuts"] if row["split"] == "test"] == []
    )
    page = words_of((tmp_path / "audit.html").read_text())
    assert "Shift was not tested" in page and "Shortcuts were not tested" in page
    assert "differs" not in page and "AUC" not in page
    assert all(weight != "grave" for weight, _ in facts["findings"])


def test_titles_state_a_finding_only_if_the_interval_supports_it():
    def row(lower, upper, **more):
        return dict(
            {
                "class": "sick",
                "from": "train",
                "to": "test",
                "auc": (lower + upper) / 2,
                "lower": lower,
                "upper": upper,
            },
            **more,
        )

    assert (
        shift_title([]) == "Shift was not tested"
        and shortcut_title([]) == "Shortcuts were not tested"
    )
    assert shift_title([row(0.3, 0.95)]) == "No split clearly differs from another"
    assert shift_title([row(0.3, 0.95), row(0.7, 0.8)]) == "Test differs from train: AUC 0.75"
    assert (
        shortcut_title([row(0.4, 0.99, feature="width")])
        == "No single feature separates the classes"
    )
    assert shortcut_title([row(0.6, 0.8, feature="width")]) == "Width alone: AUC 0.70 on the test"


def test_a_perfect_auc_of_few_images_has_an_interval():
    "A negative control beside it: with many images the interval is narrow"
    few, many = (
        auc_interval([0] * n + [1] * n, np.arange(2 * n), np.arange(2 * n)) for n in (5, 500)
    )
    assert few["auc"] == many["auc"] == 1 and few["lower"] < 0.6 and many["lower"] > 0.99


def test_a_difference_of_views_is_told_only_if_it_is_more_than_chance():
    shares = dict(view={"AP": dict(healthy=0.5, sick=0.65), "PA": dict(healthy=0.5, sick=0.35)})
    assert list(confounded(shares, dict(healthy=20, sick=20))) == []
    assert (
        list(confounded(shares, dict(healthy=400, sick=400)))[0]
        == "view AP: 50% of healthy but 65% of sick. Compare within view."
    )
    assert (
        list(
            confounded(
                dict(view={"AP": dict(healthy=0.50, sick=0.55)}), dict(healthy=4000, sick=4000)
            )
        )
        == []
    )


# --- the evaluation ---


def named_table(patients):
    table = simulate(patients=patients, images=1, seed=3)
    return table.assign(
        label=np.where(table.label == 1, "sick", "healthy"), probability=sigmoid(table.logit)
    ).drop(columns="logit")


def test_an_evaluation_shows_the_names_of_the_classes_and_what_few_images_cannot_show(tmp_path):
    named_table(24).to_csv(tmp_path / "own.csv", index=False)
    shown, notes = evaluate(
        [tmp_path / "own.csv"],
        tmp_path / "out",
        probability="probability",
        positive="sick",
        replicates=100,
    )
    page = (tmp_path / "out/report.html").read_text()
    assert {"F1, sick", "F1, healthy"} <= set(shown.metric)
    assert len(notes) == 1 and "images of healthy" in notes[0] and notes[0] in unescape(page)
    assert [word for word in OTHERS if word in words_of(page).lower()] == []
    for name in ("confusion_matrix", "probabilities", "misclassified", "metrics"):
        texts = " ".join(
            re.findall(
                r"<text[^>]*>([^<]*)</text>", (tmp_path / f"out/figures/{name}.svg").read_text()
            )
        )
        assert "sick" in texts and [word for word in OTHERS if word in texts.lower()] == [], name


def test_a_run_hands_its_class_names_to_the_evaluation(tmp_path):
    run = Run(tmp_path / "run").begin("02_training")
    table = simulate(patients=200, images=1, seed=3)
    run.write("predictions.csv", table)
    run.finish(data=dict(dataset="films", classes=["healthy", "sick"]), synthetic=True)
    shown, notes = evaluate([run.folder], tmp_path / "out", replicates=100)
    assert notes == [] and "F1, sick" in set(shown.metric)


def test_the_study_s_own_names_stay(tmp_path):
    simulate(patients=200, images=1, seed=3).to_csv(tmp_path / "ours.csv", index=False)
    shown, notes = evaluate([tmp_path / "ours.csv"], tmp_path / "out", replicates=100)
    assert notes == [] and {"F1, pneumonia", "F1, normal"} <= set(shown.metric)


# --- the report ---


def small_png():
    Image.new("L", (1, 1)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def drawn_run(folder, stage, data):
    "A run with one file of each figure, all written by one stage"
    run = Run(folder).begin(stage, arch="resnet18", seed=0)
    for captions in FIGURES.values():
        for name in captions:
            run.write(f"figures/{name}.png", small_png())
    run.write("figures/of_my_own.png", small_png())
    return run.finish(data=data, synthetic=False)


def headings(page):
    return re.findall(r"<h2>(.*?)</h2>", page)


@pytest.mark.parametrize("stage", ["02_data", "01_data", "05c_errors", "anything"])
def test_a_figure_stands_in_its_section_whatever_its_stage_was_called(tmp_path, stage):
    data = dict(
        dataset="films", counts=dict(train=dict(NORMAL=1, PNEUMONIA=2)), classes=["healthy", "sick"]
    )
    page = report_html(drawn_run(tmp_path / "run", stage, data))
    found = headings(page)
    assert found == [
        "What was run",
        *FIGURES,
        "Other figures",
        "Limitations",
        "Parameters",
        "Stages and files",
    ]
    errors = page[
        page.index("<h2>Errors</h2>") : page.index("<h2>Calibration and operating points</h2>")
    ]
    assert errors.count("<img") == 3 and page.count("<img") == 1 + sum(map(len, FIGURES.values()))
    assert "2 sick" in page and "1 healthy" in page


def test_limits_are_told_of_the_data_sets_of_which_they_are_true():
    run = Run("nowhere")

    def limits(**data):
        run.manifest |= dict(synthetic=False, data=data)
        return limit_sentences(run)

    children = dict(dataset="chest_xray", provenance=dict(publisher="Kermany et al. 2018"))
    assert {POPULATION_LIMIT, PUBLIC_TEST_LIMIT} <= set(limits(**children, split="grouped"))
    assert POPULATION_LIMIT in limits(
        **children, split="fresh"
    ) and PUBLIC_TEST_LIMIT not in limits(**children, split="fresh")
    for other in (
        dict(dataset="chest_xray"),
        dict(dataset="films"),
        dict(dataset="rsna", provenance=dict(publisher="RSNA")),
    ):
        assert not {POPULATION_LIMIT, PUBLIC_TEST_LIMIT} & set(limits(**other))
    own = " ".join(limits(dataset="films", classes=["healthy", "sick"]))
    assert "share of sick" in own and [word for word in OTHERS if word in own.lower()] == []


@pytest.mark.parametrize(
    "folder", sorted((ROOT / "results").glob("first_edition/*/seed0")), ids=lambda p: p.parent.name
)
def test_reports_of_published_runs_have_their_figures_and_limits(folder):
    run = Run(folder, verify=False)
    run.manifest["artefacts"] = {
        n: a for n, a in run.manifest["artefacts"].items() if run.path(n).is_file()
    }  # Figures are not published
    page = report_html(run)
    value = run.read("metrics.json")["figures"]["test.auc"]["value"]
    assert f"<b>{value:.3f}</b>" in page and "with fewer than" not in page
    assert "children" in words_of(page)
    assert headings(page)[:2] == ["Summary", "What was run"] and "not contradicted" not in page
