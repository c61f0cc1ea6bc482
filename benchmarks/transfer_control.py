"""The rule that compares validation with the test: on the published runs, and on splits without any shift.

Writes two tables into results/first_edition. transfer.csv has a row for each value of each published seed of a current
recipe: validation and test as its calibration.json has them, the old rule (`kept`), and the chances of the corrected
one (`worse`). transfer_control.csv is the negative control: validation patients of each seed halved at random, one half
called test, so that every alarm is false. Calibrator, thresholds and sets are fitted on the other half, as in a run.

usage: python benchmarks/transfer_control.py [--splits 5] [--replicates 200] [--out FOLDER]
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from cxr_study.calibrate.calibrators import fit_calibrator
from cxr_study.calibrate.conformal import fit_sets
from cxr_study.calibrate.thresholds import operating_points
from cxr_study.calibrate.transfer import validation_to_test
from cxr_study.core.run import Run, atomic_write, root
from cxr_study.pipeline.published import published_predictions
from cxr_study.predict.decision import Calibration

FOLDER = root() / 'results/first_edition'
CHANCES = ('kept', 'worse', 'p', 'p_corrected', 'independent')


def published_rows(folder: Path, table: pd.DataFrame, replicates: int) -> list[dict]:
    "Every value of one published seed: validation, test with interval, and both rules"
    committed = Run(folder, verify=False).read('calibration.json')
    calibration = Calibration.from_dict(committed)
    chances = {}
    for row in validation_to_test(calibration, table, replicates=replicates):
        chances[row['point'], row['metric']] = row
    rows = []
    for row in committed['promised_and_got']:
        name = dict(point=row['point'], metric=row['metric'])
        got = {k: row['got'][k] for k in ('lower', 'upper', 'n')}
        values = dict(validation=row['promised']['value'], test=row['got']['value'], **got)
        chance = chances[row['point'], row['metric']] | dict(kept=row['kept'])
        rows.append(name | values | {k: chance[k] for k in CHANCES})
    return rows


def published(results: Path, replicates: int) -> pd.DataFrame:
    "`published_rows` of all current recipes"
    parts = []
    for name, tables in published_predictions(results).items():
        for seed, table in tables.items():
            rows = published_rows(results / name / seed, table, replicates)
            parts.append(pd.DataFrame(rows).assign(experiment=name, seed=seed))
    return pd.concat(parts, ignore_index=True)


def halved(val: pd.DataFrame, seed: int) -> pd.DataFrame:  # Table of predictions of validation
    "The same images, those of one random half of the patients called test"
    patients = val.patient_id.unique()
    rng = np.random.default_rng(seed)
    called_test = rng.permutation(patients)[: len(patients) // 2]
    return val.assign(split=np.where(val.patient_id.isin(called_test), 'test', 'val'))


def compared(val: pd.DataFrame, seed: int, replicates: int) -> pd.DataFrame:
    "What both rules say of one split: a row a value"
    table = halved(val, seed)
    rows_of_fit = table[table.split == 'val']
    calibrator = fit_calibrator('platt', rows_of_fit, quiet=True)
    after = rows_of_fit.assign(logit=calibrator(rows_of_fit.logit))
    points = operating_points(after, replicates=replicates)
    sets = fit_sets(rows_of_fit)
    calibration = Calibration(calibrator, tuple(points), 'sensitivity_0.98', sets)
    rows = validation_to_test(calibration, table, replicates=replicates, seed=seed)
    names = ('point', 'metric', 'kept', 'worse', 'p_corrected')
    return pd.DataFrame([{name: row[name] for name in names} for row in rows])


def write(table: pd.DataFrame, path: Path) -> None:
    with atomic_write(path) as file:
        table.round(4).to_csv(file, index=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--splits', type=int, default=5)
    parser.add_argument('--replicates', type=int, default=200)
    parser.add_argument('--out', type=Path, default=FOLDER)
    options = parser.parse_args()
    write(published(FOLDER, options.replicates), options.out / 'transfer.csv')
    parts = []
    for k in range(options.splits):
        for name, tables in published_predictions().items():
            for seed, table in tables.items():
                val = table[table.split == 'val']
                part = compared(val, len(parts), options.replicates)
                parts.append(part.assign(experiment=name, seed=seed, halving=k))
        whole = pd.concat(parts, ignore_index=True)
        write(whole, options.out / 'transfer_control.csv')
        alarms = whole.groupby(['experiment', 'seed', 'halving']).worse.any().mean()
        print(f"{k + 1} splits of each seed: {alarms:.1%} of them raise an alarm", flush=True)


if __name__ == '__main__':
    main()
