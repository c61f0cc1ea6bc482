"""Compute every result of the published runs from their predictions.

    python tools/write_summary.py [FOLDER]      (default: results/first_edition)

Writes summary.csv, summary.json and together.json beside the runs.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from cxr_study.calibrate.calibrators import choose_calibrator
from cxr_study.calibrate.measures import ece_debiased
from cxr_study.calibrate.thresholds import rules
from cxr_study.core.run import Run, StudyError, atomic_write, root, to_json
from cxr_study.evaluate.comparison import (
    ensemble,
    mean_auc_interval,
    mean_entries,
    scored_alike,
)
from cxr_study.evaluate.evaluation import (
    closed_form_intervals,
    evaluate_at,
    figure_key,
    metric_title,
)
from cxr_study.evaluate.intervals import Measure
from cxr_study.evaluate.metrics import (
    HALF,
    Scored,
    confusion_counts,
    decision_rates,
    fast_metrics,
    losses,
    scored,
)
from cxr_study.pipeline.published import is_variant, published_experiments, published_facts
from cxr_study.predict.decision import Calibration, Calibrator, OperatingPoint
from cxr_study.predict.table import PredictionError, read_predictions

GOAL_POINT = "sensitivity_0.95"
# Metrics of the uncalibrated network at a threshold of 0.5, which was not chosen on any data
AT_HALF = ("auc", "accuracy", "sensitivity", "specificity", "balanced_accuracy", "brier")
MEASURES = {name: metric_title(name) for name in AT_HALF} | dict(
    brier_calibrated="Brier score, calibrated",
    ece="ECE",
    ece_calibrated="ECE, calibrated",
    sensitivity_promised="Sensitivity, threshold for 0.95",
    specificity_promised="Specificity, threshold for 0.95",
)
# Suffix of a column -> field of an entry
BOUNDS = {"": "value", "_sd": "sd", "_lower": "lower", "_upper": "upper"}
# Obuchowski and Rockette's interval of the mean AUC
READERS = ("readers_lower", "readers_upper")
ECE_REPLICATES = 400  # Of the mean calibration error, which is slow


# --- The test of one seed, or of an ensemble


class CalibratedTest(NamedTuple):
    "Test rows of a run or an ensemble; calibrator and threshold come from validation patients"

    raw: pd.DataFrame  # With the network's logits
    calibrated: pd.DataFrame  # With calibrated logits
    threshold: float  # Of one operating point, on calibrated probabilities


def calibration_of(run: Run, val: pd.DataFrame, point: str) -> tuple[Calibrator, float]:
    "Calibrator and threshold of a run's `calibration.json`; without one, those of its validation rows"
    try:
        calibration = Calibration.from_dict(run.read("calibration.json"))
        return calibration.calibrator, calibration.point(point).threshold
    except (StudyError, PredictionError):
        seed = run.manifest["parameters"].get("seed", 0)
        calibrator, _ = choose_calibrator(val, seed=seed)
        calibrated_rules = rules(val.assign(logit=calibrator(val.logit)))
        return calibrator, calibrated_rules[point][0]


def calibrated_test(
    run: Run,
    point: str = GOAL_POINT,  # Name of the operating point whose threshold is used
) -> CalibratedTest:
    "Test rows of a run before and after calibration"
    table = read_predictions(run.path("predictions.csv"))
    calibrator, threshold = calibration_of(run, table[table.split == "val"], point)
    raw = table[table.split == "test"]
    calibrated = raw.assign(logit=calibrator(raw.logit))
    return CalibratedTest(raw, calibrated, threshold)


def ensemble_test(
    members: dict[str, CalibratedTest],  # Such as seed -> its test rows
) -> CalibratedTest:
    """Test rows of an ensemble.

    Each member keeps the calibrator and the threshold of its own validation. The ensemble averages calibrated
    probabilities and thresholds, because where each seed has its own split it has no validation patients."""
    raw = {name: member.raw for name, member in members.items()}
    calibrated = {name: member.calibrated for name, member in members.items()}
    threshold = np.mean([member.threshold for member in members.values()])
    return CalibratedTest(ensemble(raw), ensemble(calibrated), float(threshold))


# --- Its results


def _measure_of(raw: Scored, calibrated: Scored, threshold: float) -> Measure:
    "The metrics of `MEASURES` but the calibration errors, as a function of the patients' weights"
    point = OperatingPoint(GOAL_POINT, threshold, "")

    def values(weights: np.ndarray) -> dict[str, np.ndarray]:
        of_calibrated = weights[:, calibrated.patient]
        at_half = fast_metrics(raw, weights[:, raw.patient], HALF)
        at_goal = decision_rates(*confusion_counts(calibrated, of_calibrated, point))
        found = {name: at_half[name] for name in AT_HALF}
        found["brier_calibrated"] = losses(calibrated, of_calibrated)["brier"]
        found["sensitivity_promised"] = at_goal["sensitivity"]
        found["specificity_promised"] = at_goal["specificity"]
        return found

    return values


def _errors_of(raw: Scored, calibrated: Scored) -> Measure:
    "The calibration errors as a function of the patients' weights"
    return lambda weights: dict(
        ece=ece_debiased(raw, weights[:, raw.patient]),
        ece_calibrated=ece_debiased(calibrated, weights[:, calibrated.patient]),
    )


class Measured(NamedTuple):
    "What is measured in each of several tests"

    metrics: list[Measure]
    errors: list[Measure]  # Calibration errors, which are slow
    like: Scored  # One of the tests
    patients: int  # Of all tests


def _measured(tests: list[CalibratedTest]) -> Measured:
    tables = [table for test in tests for table in (test.raw, test.calibrated)]
    found, patients = scored_alike(tables, "test")
    metrics, errors = [], []
    for raw, calibrated, test in zip(found[::2], found[1::2], tests):
        metrics.append(_measure_of(raw, calibrated, test.threshold))
        errors.append(_errors_of(raw, calibrated))
    return Measured(metrics, errors, found[0], patients)


def values_of(test: CalibratedTest) -> dict[str, float]:
    "Every metric of `MEASURES`"
    of_test = _measured([test])
    ones = np.ones((1, of_test.patients))
    values = of_test.metrics[0](ones) | of_test.errors[0](ones)
    return {name: float(values[name][0]) for name in MEASURES}


def _bounds(
    test: CalibratedTest,
    at_half: dict[str, dict],  # Entries of the metrics in `AT_HALF`
) -> dict[str, dict]:
    "Intervals of the metrics that have one; at the threshold for 0.95 they are Wilson's, over patients"
    bounds = {}
    for name in AT_HALF:
        bounds[name] = {k: at_half[name][k] for k in ("lower", "upper", "method")}
    point = OperatingPoint(GOAL_POINT, test.threshold, "")
    wilson = closed_form_intervals(scored(test.calibrated, "test"), point, 0.95)
    for name in ("sensitivity", "specificity"):
        method, lower, upper = wilson[name]
        bounds[f"{name}_promised"] = dict(lower=lower, upper=upper, method=method)
    return bounds


def entries_of(
    test: CalibratedTest,
    at_half: dict[str, dict],  # Entries of the metrics in `AT_HALF`
) -> dict[str, dict]:  # Metric -> entry as in `metrics.json`
    "Every metric with its interval, if it has one"
    bounds = _bounds(test, at_half)
    calibrated = scored(test.calibrated, "test")
    patients = int(calibrated.patients) if calibrated.clustered else None
    size = dict(n=len(calibrated.label), patients=patients)
    without_interval = dict(lower=None, upper=None, method=None)
    entries = {}
    for name, value in values_of(test).items():
        interval = bounds.get(name, without_interval)
        entries[name] = dict(value=value, **interval, **size)
    return entries


def _run_entries(run: Run, test: CalibratedTest) -> dict[str, dict]:
    "Entries of a run; the intervals at a threshold of 0.5 come from its `metrics.json`"
    figures = run.read("metrics.json")["figures"]
    at_half = {name: figures[figure_key("test", name)] for name in AT_HALF}
    return entries_of(test, at_half)


def _ensemble_entries(members: dict[str, CalibratedTest], replicates: int) -> dict[str, dict]:
    "Entries of an ensemble, with intervals over patients"
    test = ensemble_test(members)
    return entries_of(test, evaluate_at(test.raw, HALF, "test", replicates=replicates))


def _mean_entries(
    tests: dict[str, CalibratedTest],  # Seed -> its test rows
    replicates: int,
) -> dict[str, dict]:
    "Mean of each metric over seeds, with its interval for other seeds and other patients"
    measured = _measured(list(tests.values()))
    like, patients = measured.like, measured.patients
    few = min(replicates, ECE_REPLICATES)
    entries = mean_entries(measured.metrics, like, patients, replicates)
    entries |= mean_entries(measured.errors, like, patients, few, jackknife=False)
    size = dict(n=len(like.label), patients=int(like.patients) if like.clustered else None)
    entries = {name: entries[name] | size for name in MEASURES}
    readers = mean_auc_interval({seed: test.raw for seed, test in tests.items()})
    entries["auc"] |= dict(readers_lower=readers.lower, readers_upper=readers.upper)
    return entries


# --- All experiments


def experiment_figures(
    runs: dict[str, Run],  # Seed -> `Run`
    replicates: int = 2000,
) -> dict[str, dict]:  # Seed, 'mean' or 'ensemble' -> metric -> entry
    "Results of every seed; with two seeds or more also their mean and their ensemble"
    tests = {seed: calibrated_test(run) for seed, run in runs.items()}
    seeds = {seed: _run_entries(run, tests[seed]) for seed, run in runs.items()}
    if len(runs) < 2:
        return seeds
    return seeds | dict(
        mean=_mean_entries(tests, replicates), ensemble=_ensemble_entries(tests, replicates)
    )


def _summary_row(entries: dict[str, dict]) -> dict:
    "The columns of the results of one experiment: size, and every metric with its bounds"
    row = dict(n=entries["auc"]["n"], patients=entries["auc"]["patients"])
    for metric, entry in entries.items():
        for suffix, field in BOUNDS.items():
            row[f"{metric}{suffix}"] = entry.get(field)
    for field in READERS:
        row[f"auc_{field}"] = entries["auc"].get(field)
    return row


def summary_table(folder: Path | None = None, replicates: int = 2000) -> pd.DataFrame:
    "One row per experiment and seed, mean or ensemble (column `who`): facts and results"
    rows = []
    for name, runs in published_experiments(folder).items():
        facts = published_facts(next(iter(runs.values())))
        for who, entries in experiment_figures(runs, replicates).items():
            seeds = len(runs) if who in ("mean", "ensemble") else 1
            row = dict(experiment=name, who=who, seeds=seeds)
            rows.append(row | facts | _summary_row(entries))
    table = pd.DataFrame(rows).convert_dtypes()
    return table.dropna(axis="columns", how="all").round(6)


def _float_or_none(value) -> float | None:
    return None if pd.isna(value) else float(value)


def quotable(
    table: pd.DataFrame,  # From `summary_table`
) -> dict[str, dict]:  # Such as `pneumoniamnist-resnet18:mean.auc` -> entry
    "The results in the form of `metrics.json`"
    figures = {}
    for row in table.to_dict("records"):
        size = dict(seeds=int(row["seeds"]), n=int(row["n"]))
        for metric in MEASURES:
            entry = {}
            for suffix in ("", "_lower", "_upper", "_sd"):
                entry[BOUNDS[suffix]] = _float_or_none(row.get(f"{metric}{suffix}"))
            if metric == "auc" and row["who"] == "mean":
                entry |= {field: _float_or_none(row.get(f"auc_{field}")) for field in READERS}
            figures[f"{row['experiment']}:{row['who']}.{metric}"] = entry | size
    return figures


def together(
    folder: Path | None = None, replicates: int = 2000
) -> dict[str, dict]:  # Such as `chest_xray.auc` -> entry
    "Results of the ensemble of all current networks of each data set"
    by_dataset = {}
    for name, runs in published_experiments(folder).items():
        first = next(iter(runs.values()))
        if is_variant(first.folder):
            continue
        members = by_dataset.setdefault(published_facts(first)["dataset"], {})
        for seed, run in runs.items():
            members[f"{name}/{seed}"] = calibrated_test(run)
    figures = {}
    for dataset, members in by_dataset.items():
        if len(members) > 1:
            for metric, entry in _ensemble_entries(members, replicates).items():
                figures[f"{dataset}.{metric}"] = entry
    return figures


def write_summary(
    folder: Path | None = None,  # None: the project's `results/first_edition`
    replicates: int = 2000,  # Of the bootstrap of patients
) -> pd.DataFrame:  # From `summary_table`
    "Write `summary.csv`, `summary.json` and `together.json` beside the experiments"
    folder = Path(folder or root() / "results/first_edition")
    table = summary_table(folder, replicates)
    files = {"summary.json": quotable(table), "together.json": together(folder, replicates)}
    with atomic_write(folder / "summary.csv") as file:
        table.to_csv(file, index=False)
    for name, figures in files.items():
        content = dict(schema=1, figures=figures)
        with atomic_write(folder / name) as file:
            file.write_text(to_json(content, indent=1) + "\n")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, help="folder of published runs")
    table = write_summary(parser.parse_args().folder)
    print(table[["experiment", "who", "seeds", "auc", "accuracy"]].to_string(index=False))


if __name__ == "__main__":
    main()
