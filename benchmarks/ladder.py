"""What each candidate recipe of the second edition gave on validation: criterion C, with intervals; nothing is trained.

The candidates, their folds and C are those of ANALYSIS_PLAN.md, section 5. Fold k was trained with seed k, so a
candidate's spread is over seeds and folds at once. OUT gets ladder.json, whose `figures` are named
  <data set>.<candidate>.criterion              mean over the folds that all candidates finished, and SD over trainings
  <data set>.<candidate>.excess                 criterion less that of the candidate with the lowest one, paired
  <data set>.<candidate>.wide_specificity       of wide validation normals, at a sensitivity of 0.97 on validation
  <data set>.<candidate>.valid_auc
  <data set>.folds                              number of folds that count
Intervals draw children within each fold, and trainings where there are several; calibrators and thresholds stay fixed.

usage: ladder.py [--edition results/second_edition] [--replicates 2000]
"""

import argparse
import math
from pathlib import Path

import numpy as np
from second_edition_films import VERSIONS
from second_edition_findings import auc, child_weights, entry, share
from second_edition_rule import SENSITIVITY, choose, criterion, wide_specificity
from second_edition_tables import films_of, read

from cxr_study.core.run import atomic_write, root, to_json
from cxr_study.evaluate.intervals import two_way

EDITION = root() / 'results/second_edition'


def trainings(facts, logits, data):  # From `read`; name of a data set
    "(name, fold) -> (validation films, version -> logits), in the order of the plan"
    films, found = films_of(facts, data), {}
    for job in facts['jobs']:
        about = job['job']
        if (about['part'], about['data']) == ('candidates', data):
            val = films[films.fold == about['fold']].reset_index(drop=True)
            z = {v: logits[f"{job['key']}/val/{v}"].astype(float) for v in VERSIONS}
            found[about['name'], about['fold']] = val, z
    return found


def chosen_by_rule(found, names):  # From `trainings`; simple to complex
    "The rule's choice with its table, computed again"
    parts = {}
    for key, (val, z) in found.items():
        sick = val.label.to_numpy() == 1
        parts[key] = dict(
            parts=criterion(z, val),
            children=val.patient_id.to_numpy(),
            wide_specificity=wide_specificity(z['plain'], val),
            valid_auc=auc(z['plain'], sick.astype(float), np.ones((1, len(val))))[0],
        )
    return choose(parts, names)


def metrics_of(val, z, weights):  # Films; version -> logits; [replicates, films]
    "Metric -> one a replicate"
    y, plain = val.label.to_numpy(), z['plain']
    sick = np.sort(plain[y == 1])
    threshold = sick[math.floor((1 - SENSITIVITY) * len(sick))]
    wide = ((y == 0) & val.wide).to_numpy()
    return dict(
        criterion=share(criterion(z, val), weights),
        wide_specificity=share((plain < threshold)[wide].astype(float), weights[:, wide]),
        valid_auc=auc(plain, y.astype(float), weights),
    )


def ladder(edition, data, replicates):
    "Name -> entry of one data set"
    facts, logits = read(*sorted(Path(edition).glob('call*')))
    found = trainings(facts, logits, data)
    names = [row['candidate'] for row in facts['choice'][data]['table']]
    chosen, table = chosen_by_rule(found, names)
    if chosen != facts['choice'][data]['chosen']:
        raise ValueError(f"The rule chose {facts['choice'][data]['chosen']}, and {chosen} now.")
    folds, points, draws = table[0]['folds'], {}, {}
    for name in names:
        for fold in folds:
            val, z = found[name, fold]
            weights = child_weights(val.patient_id, replicates, seed=fold)
            once = metrics_of(val, z, np.ones((1, len(val))))
            for metric, values in metrics_of(val, z, weights).items():
                points.setdefault((name, metric), []).append(once[metric][0])
                draws.setdefault((name, metric), []).append(values)
    points, draws = ({k: np.stack(v) for k, v in part.items()} for part in (points, draws))
    best = min(names, key=lambda name: points[name, 'criterion'].mean())
    for name in names:
        for part in (points, draws):
            part[name, 'excess'] = part[name, 'criterion'] - part[best, 'criterion']
    entries = {
        f'{data}.{name}.{metric}': entry(each.mean(), two_way(draws[name, metric]), each)
        for (name, metric), each in points.items()
    }
    return entries | {f'{data}.folds': dict(value=float(len(folds)), lower=None, upper=None)}


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--edition', type=Path, default=EDITION)
    parser.add_argument('--replicates', type=int, default=2000)
    parser.add_argument('--out', type=Path, default=EDITION)
    options = parser.parse_args(arguments)
    entries = {}
    for data in ('chest_xray', 'pneumoniamnist'):
        entries |= ladder(options.edition, data, options.replicates)
    with atomic_write(options.out / 'ladder.json') as file:
        file.write_text(to_json(dict(schema=1, figures=entries), indent=1) + '\n')


if __name__ == '__main__':
    main()
