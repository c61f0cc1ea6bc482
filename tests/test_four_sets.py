"""Every figure on the four sets follows from the committed predictions, and no ranking mixes tests."""

import json
from itertools import islice

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from notebook_functions import functions_of
from sklearn.metrics import roc_auc_score
from write_four_sets import (
    IN_USE,
    METRICS,
    first_edition,
    quotable,
    rows_of,
    second_edition,
    shape_figures,
)

from cxr_study.core.options import POINTS
from cxr_study.data.match import test_part as part_of
from cxr_study.data.sets import pneumoniamnist_matches
from cxr_study.predict.decision import Calibration

RESULTS = ROOT / "results"
SUMMARY = functions_of("results/01_summary")
PARTS = dict(common="common", others="other normals")


@pytest.fixture(scope="module")
def committed():
    return SUMMARY.read_four_sets()


def by_hand(folder):
    "Set -> metrics of one published seed, from its csv and its calibration alone"
    table = pd.read_csv(folder / "predictions.csv").query("split == 'test'")
    calibration = Calibration.from_dict(json.loads((folder / "calibration.json").read_text()))
    probability = 1 / (1 + np.exp(-calibration.calibrator(table.logit)))
    table = table.assign(
        used=probability >= calibration.point(IN_USE).threshold,
        half=table.logit >= 0,
        part=part_of(table.image_id),
    )
    found = {}
    for part in ("all", "common", "others"):
        rows = table if part == "all" else table[table.part == PARTS[part]]
        normal, sick = rows[rows.label == 0], rows[rows.label == 1]
        found[part] = dict(
            specificity=1 - normal.used.mean(), specificity_half=1 - normal.half.mean()
        )
        if len(sick):
            auc = roc_auc_score(rows.label, rows.logit)
            found[part] |= dict(sensitivity=sick.used.mean(), auc=auc)
    return found


def test_seeds_and_means_of_the_first_edition_follow_from_their_predictions(committed):
    for experiment, rows in committed[committed.edition == 1].groupby("experiment"):
        folders = [
            f.parent
            for f in sorted((RESULTS / "first_edition" / experiment).glob("seed*/calibration.json"))
        ]
        each = {folder.name: by_hand(folder) for folder in folders}
        values = rows.set_index(["who", "part"])
        for part in ("all", "common", "others"):
            for who, sets in each.items():
                for metric, value in sets[part].items():
                    assert values.loc[(who, part), metric] == pytest.approx(value, abs=2e-6)
            if len(each) > 1:
                for metric in next(iter(each.values()))[part]:
                    of_seeds = [sets[part][metric] for sets in each.values()]
                    row = values.loc[("mean", part)]
                    assert row[metric] == pytest.approx(np.mean(of_seeds), abs=2e-6)
                    assert row[f"{metric}_sd"] == pytest.approx(np.std(of_seeds, ddof=1), abs=2e-6)


def test_the_second_edition_agrees_with_its_findings(committed):
    "The findings were made with an earlier match, which differs in one film of the common ones"
    tables = json.loads((RESULTS / "second_edition/findings.json").read_text())["tables"]
    titles = {"all": "all", "common": "common", "the 66": "others", "the 67": "others"}
    compared = 0
    for name, sets in tables.items():
        network, _, kind = name.replace(": ", "-").partition(", ")
        network = network.replace(" distilled", "-distilled").replace("all networks", "together")
        rows = committed[committed.experiment == f"second-{network}"].set_index(["who", "part"])
        for title, entries in sets.items():
            who = "ensemble" if kind else ("mean" if "mean" in rows.index else "seed0")
            row = rows.loc[(who, titles[title])]
            for metric in ("auc", "specificity", "sensitivity", "accuracy", "specificity_half"):
                value = entries.get(metric, {}).get("value")
                if value is not None and pd.notna(row.get(metric)):
                    assert row[metric] == pytest.approx(value, abs=0.006), (name, title, metric)
                    compared += 1
    assert compared > 80


def test_intervals_are_derived_again(committed):
    "All rows of a network of two seeds, and the first seed of one of the second edition"
    two_seeds = next(p for p in first_edition(RESULTS) if p.name.endswith("equalise96"))
    one_of_eight = next(second_edition(RESULTS))
    rows = [*rows_of(two_seeds), *islice(rows_of(one_of_eight), 3)]
    assert len(rows) == 4 * 3 + 3
    keys = ["experiment", "who", "part"]
    again = pd.DataFrame(rows).set_index(keys)
    before = committed.set_index(keys).loc[again.index]
    for metric in METRICS:
        for suffix in ("", "_lower", "_upper"):
            name = metric + suffix
            old, new = before[name].astype(float), again[name].astype(float)
            np.testing.assert_allclose(new, old, atol=2e-6, err_msg=name)


def test_texts_quote_the_table(committed):
    figures = json.loads((RESULTS / "four_sets.json").read_text())["figures"]
    shape = shape_figures()
    assert figures == json.loads(json.dumps(quotable(committed))) | shape
    assert 0.84 < shape["shape:training.auc"]["value"] < 0.89


def test_the_sets_have_their_sizes(committed):
    matches = pneumoniamnist_matches()
    in_both = matches[(matches.image_id != "") & (matches.file != "")]
    common = in_both.image_id.str.startswith("test").sum()
    sizes = committed.drop_duplicates(["dataset", "part"]).set_index(["dataset", "part"])
    assert sizes.n["pneumoniamnist", "common"] == common
    assert sizes.n["chest_xray", "others"] == 66 and sizes.n["pneumoniamnist", "others"] == 67
    for dataset in ("chest_xray", "pneumoniamnist"):
        parts = sizes.n[dataset]
        assert parts["common"] + parts["others"] == parts["all"] == 624
        assert sizes.normals[dataset]["others"] == parts["others"]
        assert sizes.patients[dataset]["common"] < parts["common"]


def test_no_ranking_holds_figures_of_two_tests(committed):
    literature = SUMMARY.read_literature()
    drawn = SUMMARY.literature_rows(
        literature, SUMMARY.both_editions(SUMMARY.read_summary(), SUMMARY.read_four_sets())
    )
    tests = {row.get("test") for row in drawn.values() if row["kind"] != "ours"}
    assert tests == {SUMMARY.TESTS["pneumoniamnist"]}
    ours = {row["ensemble"].dataset.iloc[0] for row in drawn.values() if row["kind"] == "ours"}
    assert ours == {"pneumoniamnist"}
    for name in committed.set.unique():
        shown = SUMMARY.set_table(committed, name)
        datasets = {"Kermany" in network for network in shown.network}
        assert len(datasets) == 2 if name == "common films" else len(datasets) == 1


def test_an_ensemble_is_said_to_have_all_its_members():
    rows = SUMMARY.second_rows(SUMMARY.read_four_sets())
    rows = rows[rows.who.isin(["mean", "ensemble"])].set_index(["experiment", "who"]).seeds
    for dataset in ("chest_xray", "pneumoniamnist"):
        members = rows.xs("mean", level="who").filter(like=dataset)
        plain = members[~members.index.str.endswith("-distilled")]
        assert rows[f"{dataset}-together", "ensemble"] == plain.sum()
        for name, number in members.items():
            assert rows[name, "ensemble"] == number


def test_the_shipped_network_is_compared_by_its_own_chances():
    shipped = SUMMARY.shipped()
    assert shipped
    for run in shipped.values():
        own = json.loads((run.folder / "calibration.json").read_text())["promised_and_got"]
        assert SUMMARY.compared_rows(run) == own
        assert all("p_corrected" in row for row in own if row["point"] in POINTS)
