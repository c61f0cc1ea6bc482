"""Compute the figures of all published networks, of both editions, on the four sets of test films.

    python tools/write_four_sets.py

Writes four_sets.csv and four_sets.json in results/.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from write_summary import calibrated_test, calibration_of, ensemble_test

from cxr_study.core.run import Run, atomic_write, root, to_json
from cxr_study.data.sets import pneumoniamnist_matches
from cxr_study.evaluate.evaluation import evaluate_at
from cxr_study.evaluate.metrics import HALF
from cxr_study.pipeline.four_sets import (
    PARTS,
    JudgedTest,
    films_of_part,
    loss_on_others,
    part_entries,
    with_children,
)
from cxr_study.pipeline.published import is_variant, published_experiments, published_facts
from cxr_study.predict.decision import sigmoid
from cxr_study.predict.table import read_predictions

sys.path.insert(0, str(root() / "benchmarks"))
from second_edition_findings import Network, networks_of, threshold_in_use
from second_edition_tables import films_of, read

IN_USE = "sensitivity_0.98"  # Of the first edition; the second has the rule of its plan
# Name of a set: (data set, part of its test)
SET_TITLES = {
    ("chest_xray", "all"): "Kaggle's 624",
    ("pneumoniamnist", "all"): "PneumoniaMNIST's 624",
    ("chest_xray", "common"): "common films",
    ("pneumoniamnist", "common"): "common films",
    ("chest_xray", "others"): "Kaggle's other normals",
    ("pneumoniamnist", "others"): "PneumoniaMNIST's other normals",
}
METRICS = (
    "auc",
    "brier",
    "accuracy",
    "sensitivity",
    "specificity",
    "accuracy_half",
    "sensitivity_half",
    "specificity_half",
    "share_of_loss",
    "share_of_loss_half",
)
BOUNDS = {"": "value", "_lower": "lower", "_upper": "upper", "_sd": "sd"}


class Published(NamedTuple):
    "The tests of one network: a test a seed, and their ensemble"

    edition: int
    name: str  # Such as `chest_xray-resnet18`
    dataset: str
    seeds: dict[str, JudgedTest]  # Such as `seed0`; empty for an ensemble of several networks
    ensemble: JudgedTest | None  # None for a single seed


# --- First edition: runs in results/first_edition


def _specificity(logit: np.ndarray, threshold: float) -> float:
    "Share of normals below a threshold on the probability"
    return float((sigmoid(logit) < threshold).mean())


def _judged_run(run: Run) -> JudgedTest:
    "A published seed, with the specificity that its validation gives"
    test = calibrated_test(run, IN_USE)
    table = read_predictions(run.path("predictions.csv"))
    val = table[table.split == "val"]
    calibrator, threshold = calibration_of(run, val, IN_USE)
    normal = val.logit[val.label == 0]
    return JudgedTest(
        test.raw,
        test.calibrated,
        threshold,
        validation=_specificity(calibrator(normal), threshold),
        validation_half=_specificity(normal, 0.5),
    )


def _judged_ensemble(runs: dict[str, Run]) -> JudgedTest:
    "Mean calibrated probability and mean threshold; its members may have other validation children"
    members = {name: calibrated_test(run, IN_USE) for name, run in runs.items()}
    return JudgedTest(*ensemble_test(members))


def first_edition(folder: Path) -> Iterator[Published]:
    "All networks with runs in `folder/first_edition`, then the ensembles of all current networks of a data set"
    by_dataset = {}
    for name, runs in published_experiments(folder / "first_edition").items():
        first = next(iter(runs.values()))
        dataset = published_facts(first)["dataset"]
        seeds = {seed: _judged_run(run) for seed, run in runs.items()}
        ensemble = _judged_ensemble(runs) if len(runs) > 1 else None
        yield Published(1, name, dataset, seeds, ensemble)
        if not is_variant(first.folder):
            members = by_dataset.setdefault(dataset, {})
            members.update({f"{name}/{seed}": run for seed, run in runs.items()})
    for dataset, runs in by_dataset.items():
        if len(runs) > 1:
            yield Published(1, f"{dataset}-together", dataset, {}, _judged_ensemble(runs))


# --- Second edition: logits in results/second_edition


def _judged_logits(
    test: pd.DataFrame,  # Films with `label`, without logits
    logit: np.ndarray,  # Calibrated, of these films
    val: pd.DataFrame,
    val_logit: np.ndarray,
) -> JudgedTest:
    "A network or an ensemble at the threshold of the plan's rule; one half is of the calibrated probability"
    threshold = threshold_in_use(val_logit, val)
    table = test.assign(split="test", logit=logit)
    normal = val_logit[val.label == 0]
    return JudgedTest(
        table,
        table,
        float(sigmoid(threshold)),
        validation=float((normal < threshold).mean()),
        validation_half=float((normal < 0).mean()),
    )


def _calibrated_logits(networks: list[Network]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    "Calibrated logits of all trainings of these networks, on the test and on validation"
    members = [(network, i) for network in networks for i in range(len(network))]
    on_test = [network.calibrated(i, "test/1") for network, i in members]
    on_val = [network.calibrated(i, "val/plain") for network, i in members]
    return on_test, on_val


def _judged_networks(networks: list[Network]) -> tuple[list[JudgedTest], JudgedTest]:
    "A test a training, and that of their ensemble: the mean calibrated logit"
    first = networks[0]
    val = first.val(0)
    on_test, on_val = _calibrated_logits(networks)
    each = []
    for logit, val_logit in zip(on_test, on_val):
        each.append(_judged_logits(first.test, logit, val, val_logit))
    together = _judged_logits(first.test, np.mean(on_test, 0), val, np.mean(on_val, 0))
    return each, together


def second_edition(folder: Path) -> Iterator[Published]:
    "The networks of the plan's section 6, then the ensembles of all of them of a data set"
    calls = sorted(folder.glob("second_edition/call*"))
    if not calls:
        return
    facts, logits = read(*calls)
    films = {dataset: films_of(facts, dataset) for dataset in ("chest_xray", "pneumoniamnist")}
    by_dataset = {}
    for part in ("seeds", "distil"):
        for (dataset, arch, _), network in networks_of(facts, logits, films, part).items():
            each, ensemble = _judged_networks([network])
            names = [f"seed{job['job']['seed']}" for job in network.jobs]
            suffix = "-distilled" if part == "distil" else ""
            name = f"second-{dataset}-{arch}{suffix}"
            several = ensemble if len(each) > 1 else None
            yield Published(2, name, dataset, dict(zip(names, each)), several)
            if part == "seeds":
                by_dataset.setdefault(dataset, []).append(network)
    for dataset, networks in by_dataset.items():
        _, ensemble = _judged_networks(networks)
        yield Published(2, f"second-{dataset}-together", dataset, {}, ensemble)


# --- The table


def _with_children(test: JudgedTest) -> JudgedTest:
    return test._replace(own=with_children(test.own), calibrated=with_children(test.calibrated))


def _tests_of(published: Published) -> dict[str, list[JudgedTest]]:
    "Who -> tests to average: a seed, `mean` (all seeds, if there are several) or the ensemble"
    seeds = {who: _with_children(test) for who, test in published.seeds.items()}
    tests = {who: [test] for who, test in seeds.items()}
    if len(seeds) > 1:
        tests["mean"] = list(seeds.values())
    if published.ensemble:
        tests["ensemble"] = [_with_children(published.ensemble)]
    return tests


def _entries(tests: list[JudgedTest], part: str, replicates: int) -> dict[str, dict]:
    "Metric -> entry on a part; of the others also the share of the loss, where validation is known"
    entries = part_entries(tests, part, replicates=replicates)
    if part != "others":
        return entries
    shares = dict(
        share_of_loss=loss_on_others(tests, replicates=replicates),
        share_of_loss_half=loss_on_others(tests, half=True, replicates=replicates),
    )
    only_normals = {name: entries[name] for name in ("specificity", "specificity_half")}
    return only_normals | {name: entry for name, entry in shares.items() if entry}


def _size(test: JudgedTest, part: str) -> dict:
    films = test.own[films_of_part(test.own, part)]
    normals = int((films.label == 0).sum())
    return dict(n=len(films), normals=normals, patients=films.patient_id.nunique())


def _validation_of(tests: list[JudgedTest]) -> dict:
    "Specificity on validation, mean over the tests; None where it is not known"
    found = {}
    for name in ("validation", "validation_half"):
        values = [getattr(test, name) for test in tests]
        found[name] = None if None in values else float(np.mean(values))
    return found


def _columns(entries: dict[str, dict]) -> dict:
    "Every metric with its bounds as columns"
    columns = {}
    for metric in METRICS:
        entry = entries.get(metric, {})
        for suffix, field in BOUNDS.items():
            columns[metric + suffix] = entry.get(field)
    return columns


def rows_of(published: Published, replicates: int = 2000) -> Iterator[dict]:
    "A row for each seed, the mean and the ensemble of a network, on each set"
    for who, tests in _tests_of(published).items():
        for part in PARTS:
            facts = dict(
                edition=published.edition,
                experiment=published.name,
                dataset=published.dataset,
                who=who,
                seeds=len(tests),
                part=part,
                set=SET_TITLES[published.dataset, part],
            )
            entries = _entries(tests, part, replicates)
            yield facts | _size(tests[0], part) | _validation_of(tests) | _columns(entries)


def four_sets(folder: Path | None = None, replicates: int = 2000) -> pd.DataFrame:
    "One row per network, seed (or mean or ensemble) and set"
    folder = Path(folder or root() / "results")
    rows = []
    for published in (*first_edition(folder), *second_edition(folder)):
        rows.extend(rows_of(published, replicates))
    return pd.DataFrame(rows).dropna(axis="columns", how="all").round(6)


def _or_none(value) -> float | None:
    return None if value is None or pd.isna(value) else float(value)


def quotable(
    table: pd.DataFrame,  # From `four_sets`
) -> dict[str, dict]:  # Such as `chest_xray-resnet18:mean.common.auc` -> entry
    "The figures in the form of `metrics.json`"
    figures = {}
    for row in table.to_dict("records"):
        name = f"{row['experiment']}:{row['who']}.{row['part']}"
        for metric in METRICS:
            values = {f: _or_none(row.get(metric + s)) for s, f in BOUNDS.items()}
            if values["value"] is not None:
                size = {k: int(row[k]) for k in ("seeds", "n", "patients")}
                figures[f"{name}.{metric}"] = values | size
        if row["part"] == "all" and _or_none(row["validation"]) is not None:
            for metric in ("validation", "validation_half"):
                entry = dict(value=float(row[metric]), lower=None, upper=None)
                figures[f"{row['experiment']}:{row['who']}.{metric}.specificity"] = entry
    return figures


# --- Shape alone


def shape_figures(
    replicates: int = 2000,
) -> dict[str, dict]:  # `shape:training.auc` and `shape:common.auc`
    "AUC of width over height alone, in Kaggle's training films that have a match and on the common test films"
    matches = pneumoniamnist_matches()
    films = matches[(matches.file != "") & matches.ratio.notna()]
    table = pd.DataFrame(
        dict(
            image_id=films.file,
            patient_id=films.patient_id,
            split=np.where(films.file.str.startswith("test/"), "test", "train"),
            label=films.file.str.contains("/PNEUMONIA/").astype(int),
            logit=np.log(films.ratio),
        )
    )
    figures = {}
    for name, split in dict(training="train", common="test").items():
        found = evaluate_at(table, HALF, split, replicates=replicates)
        figures[f"shape:{name}.auc"] = found["auc"]
    return figures


def write_four_sets(folder: Path | None = None, replicates: int = 2000) -> pd.DataFrame:
    "Write `four_sets.csv` and `four_sets.json` (with the figures of the shape alone) beside the experiments"
    folder = Path(folder or root() / "results")
    table = four_sets(folder, replicates)
    with atomic_write(folder / "four_sets.csv") as file:
        table.to_csv(file, index=False)
    content = dict(schema=1, figures=quotable(table) | shape_figures(replicates))
    with atomic_write(folder / "four_sets.json") as file:
        file.write_text(to_json(content, indent=1) + "\n")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    table = write_four_sets()
    shown = table[table.who.isin(["mean", "ensemble"])]
    columns = ["experiment", "who", "set", "auc", "specificity", "specificity_half"]
    print(shown[columns].to_string(index=False))


if __name__ == "__main__":
    main()
