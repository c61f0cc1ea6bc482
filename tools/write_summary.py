"""Every metric of the published runs, from their predictions.

Writes results/summary.csv, summary.json and together.json.

python tools/write_summary.py
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from cxr_study.calibrate.calibrators import choose_calibrator
from cxr_study.calibrate.measures import ece_debiased
from cxr_study.calibrate.thresholds import rules
from cxr_study.core.run import Run, StudyError, atomic_write, root, to_json
from cxr_study.evaluate.comparison import ensemble
from cxr_study.evaluate.evaluation import evaluate_at, key, second_opinions, title
from cxr_study.evaluate.metrics import HALF, metrics, scored
from cxr_study.pipeline.published import experiments, facts_of, is_variant
from cxr_study.pipeline.summary import over_arm
from cxr_study.predict.decision import Calibration, OperatingPoint
from cxr_study.predict.table import PredictionError, read_predictions

GOAL_POINT = "sensitivity_0.95"
# Measures of the network as it is, at a threshold of one half, which nobody chose
AT_HALF = ("auc", "accuracy", "sensitivity", "specificity", "balanced_accuracy", "brier")
MEASURES = {name: title(name) for name in AT_HALF} | dict(
    brier_calibrated="Brier score, calibrated",
    ece="ECE",
    ece_calibrated="ECE, calibrated",
    sensitivity_promised="Sensitivity, threshold for 0.95",
    specificity_promised="Specificity, threshold for 0.95",
)
BOUNDS = {
    "": "value",
    "_sd": "sd",
    "_lower": "lower",
    "_upper": "upper",
}  # Suffix of a column -> field of an entry


# --- One seed: its test rows before and after the calibrator that its own validation chose, and its threshold


def judged(run: Run) -> tuple[pd.DataFrame, pd.DataFrame, float]:
    """Test rows, the same with calibrated logits, and the threshold for `GOAL_POINT`.

    Calibrator and threshold are chosen on the run's validation patients.

    They are those of the run's `calibration.json`; for a run without one they are derived from its validation rows."""
    table = read_predictions(run.path("predictions.csv"))
    val, test = (table[table.split == split] for split in ("val", "test"))
    try:
        calibration = Calibration.from_dict(run.read("calibration.json"))
        calibrator, threshold = calibration.calibrator, calibration.point(GOAL_POINT).threshold
    except (StudyError, PredictionError):
        calibrator = choose_calibrator(val, seed=run.manifest["parameters"].get("seed", 0))[0]
        threshold = rules(val.assign(logit=calibrator(val.logit)))[GOAL_POINT][0]
    return test, test.assign(logit=calibrator(test.logit)), threshold


def joined(parts: dict) -> tuple[pd.DataFrame, pd.DataFrame, float]:
    """The same three for the ensemble of several seeds (seed -> what `judged` gives).

    Each member keeps the calibrator and the threshold of its own validation; the ensemble averages calibrated
    probabilities and thresholds, because where each seed draws its own split it has no validation patients."""
    raw, after, thresholds = zip(*parts.values())
    return (
        ensemble(dict(enumerate(raw))),
        ensemble(dict(enumerate(after))),
        float(np.mean(thresholds)),
    )


def values_of(raw: pd.DataFrame, after: pd.DataFrame, threshold: float) -> dict[str, float]:
    "Every measure of the test, from `judged`: name -> number"
    before, calibrated = scored(raw, "test"), scored(after, "test")
    called = OperatingPoint(GOAL_POINT, threshold, "").decide(calibrated.logit)
    at_half = metrics(before, before.ones, HALF)
    found = {name: at_half[name][0] for name in AT_HALF}
    found["brier_calibrated"] = metrics(calibrated, calibrated.ones, HALF)["brier"][0]
    found["ece"] = ece_debiased(before, before.ones)[0]
    found["ece_calibrated"] = ece_debiased(calibrated, calibrated.ones)[0]
    found["sensitivity_promised"] = called[calibrated.label].mean()
    found["specificity_promised"] = (~called)[~calibrated.label].mean()
    return {name: float(found[name]) for name in MEASURES}


def entries_of(part: tuple, known: dict) -> dict[str, dict]:
    """Measure -> entry as in `metrics.json`, from `judged` and the entries at one half.

    Sensitivity and specificity at the promised threshold have Wilson intervals over patients."""
    raw, after, threshold = part
    s = scored(after, "test")
    wilson = second_opinions(s, OperatingPoint(GOAL_POINT, threshold, ""), 0.95)
    bounds = {name: {k: known[name][k] for k in ("lower", "upper", "method")} for name in AT_HALF}
    for name in ("sensitivity", "specificity"):
        bounds[f"{name}_promised"] = dict(zip(("method", "lower", "upper"), wilson[name]))
    empty = dict(lower=None, upper=None, method=None)
    size = dict(n=len(s.label), patients=int(s.patients) if s.clustered else None)
    return {
        name: dict(value=value) | empty | bounds.get(name, {}) | size
        for name, value in values_of(*part).items()
    }


# --- All of them


def experiment_figures(runs: dict[str, Run], replicates: int = 2000) -> dict[str, dict]:
    """Who (each seed; from two on `mean` and `ensemble`) -> measure -> entry.

    The mean is of the figures, its interval is Student's over seeds; the ensemble is of the probabilities, its
    interval is over patients."""
    parts = {seed: judged(run) for seed, run in runs.items()}
    found = {}
    for seed, run in runs.items():
        figures = run.read("metrics.json")["figures"]
        found[seed] = entries_of(
            parts[seed], {name: figures[key("test", name)] for name in AT_HALF}
        )
    if len(runs) < 2:
        return found
    first = next(iter(found.values()))["auc"]
    size = dict(n=first["n"], patients=first["patients"])
    together = joined(parts)
    mean = {name: over_arm([f[name]["value"] for f in found.values()]) | size for name in MEASURES}
    return found | dict(
        mean=mean, ensemble=entries_of(together, evaluate_at(together[0], HALF, "test", replicates))
    )


def summary_table(folder: Path | None = None, replicates: int = 2000) -> pd.DataFrame:
    "A row for each experiment and who: facts, and every measure with its standard deviation over seeds and its bounds"
    rows = []
    for name, runs in experiments(folder).items():
        facts = facts_of(next(iter(runs.values())))
        for who, entries in experiment_figures(runs, replicates).items():
            seeds = len(runs) if who in ("mean", "ensemble") else 1
            size = dict(n=entries["auc"]["n"], patients=entries["auc"]["patients"])
            figures = {
                f"{m}{suffix}": e.get(field)
                for m, e in entries.items()
                for suffix, field in BOUNDS.items()
            }
            rows.append(dict(experiment=name, who=who, seeds=seeds) | facts | size | figures)
    return pd.DataFrame(rows).convert_dtypes().dropna(axis="columns", how="all").round(6)


def quotable(table: pd.DataFrame) -> dict[str, dict]:
    "The figures of `summary_table` by name, such as `pneumoniamnist-resnet18:mean.auc`, in the form of `metrics.json`"

    def number(row, name):
        return None if pd.isna(row.get(name)) else float(row[name])

    found = {}
    for row in table.to_dict("records"):
        for m in MEASURES:
            figure = {field: number(row, f"{m}{suffix}") for suffix, field in BOUNDS.items()}
            order = {k: figure[k] for k in ("value", "lower", "upper", "sd")}
            found[f"{row['experiment']}:{row['who']}.{m}"] = order | dict(
                seeds=int(row["seeds"]), n=int(row["n"])
            )
    return found


def together(folder: Path | None = None, replicates: int = 2000) -> dict[str, dict]:
    "Figures of the ensemble of all networks in force of one data set by name, such as `chest_xray.auc`"
    parts = {}
    for name, runs in experiments(folder).items():
        first = next(iter(runs.values()))
        if not is_variant(first.folder):
            members = {f"{name}/{seed}": judged(run) for seed, run in runs.items()}
            parts.setdefault(facts_of(first)["dataset"], {}).update(members)
    found = {}
    for data, members in parts.items():
        if len(members) > 1:
            all_of_them = joined(members)
            entries = entries_of(all_of_them, evaluate_at(all_of_them[0], HALF, "test", replicates))
            found |= {f"{data}.{name}": entry for name, entry in entries.items()}
    return found


def write_summary(folder: Path | None = None, replicates: int = 2000) -> pd.DataFrame:
    "Write `summary.csv`, `summary.json` and `together.json` beside the experiments; returns the table"
    folder = Path(folder or root() / "results")
    table = summary_table(folder, replicates)
    named = {"summary.json": quotable(table), "together.json": together(folder, replicates)}
    with atomic_write(folder / "summary.csv") as file:
        table.to_csv(file, index=False)
    for name, figures in named.items():
        with atomic_write(folder / name) as file:
            file.write_text(to_json(dict(schema=1, figures=figures), indent=1) + "\n")
    return table


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print(write_summary()[["experiment", "who", "seeds", "auc", "accuracy"]].to_string(index=False))
