"""Test films that every ensemble of the second edition calls wrong, from committed logits alone; nothing is trained.

The ensembles of chest_xray are all seeds of ResNet-18 and all seeds of EfficientNetV2-B0, each with the plan's
calibrators and threshold; a third takes all seeds of both. OUT gets
  hard_films.csv    a row a film of Kaggle's test: label, set, probability and error of each ensemble
  hard_films.json   counts, and the figures of the three ensembles with and without the films that both call wrong

Leaving films out because networks err on them is a choice by outcome: its figures are an upper limit, not a result.

usage: hard_films.py [--edition results/second_edition] [--replicates 2000]
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from second_edition_films import WIDE
from second_edition_findings import (
    child_weights,
    entry,
    metrics,
    networks_of,
    threshold_in_use,
)
from second_edition_tables import films_of, read

from cxr_study.core.run import atomic_write, root, to_json
from cxr_study.data.match import test_part
from cxr_study.data.sets import pneumoniamnist_matches
from cxr_study.predict.decision import sigmoid

EDITION = root() / 'results/second_edition'
NAMES = dict(resnet18='resnet18', tf_efficientnetv2_b0='efficientnet')
SETS = ('the 66', 'common normals', 'pneumonias')
SHOWN = ('auc', 'accuracy', 'sensitivity', 'specificity')


def set_of(films):  # Test films of one data set
    "Name of a set for each film"
    common = test_part(films.image_id) == 'common'
    normal = np.where(common, 'common normals', 'other normals')
    return np.where(films.label == 1, 'pneumonias', normal)


def ensembles(edition, data):  # Name of a data set
    "(test films, name of an ensemble -> (logits less the threshold, calibrated logits)), of the mean of all members"
    facts, logits = read(*sorted(Path(edition).glob('call*')))
    films = films_of(facts, data)
    films = films.assign(wide=films.ratio >= WIDE)
    jobs = [entry for entry in facts['jobs'] if entry['job']['data'] == data]
    networks = networks_of(facts | dict(jobs=jobs), logits, {data: films}, 'seeds')
    groups = {NAMES[arch]: [network] for (_, arch, _), network in networks.items()}
    groups['together'] = [n for members in groups.values() for n in members]
    found = {}
    for name, group in groups.items():
        members = [(n, i) for n in group for i in range(len(n))]
        val = np.mean([n.calibrated(i, 'val/plain') for n, i in members], 0)
        test = np.mean([n.calibrated(i, 'test/1') for n, i in members], 0)
        found[name] = test - threshold_in_use(val, group[0].val(0)), test
    return group[0].test, found


def film_table(edition):
    "A row a film of Kaggle's test, with the answers of the ensembles; `both_wrong` where both networks' ensembles err"
    films, found = ensembles(edition, 'chest_xray')
    table = films[['image_id', 'patient_id', 'label']].copy()
    table['set'] = pd.Series(set_of(films)).replace('other normals', 'the 66')
    for name, (above, calibrated) in found.items():
        table[f'{name}_probability'] = sigmoid(calibrated).round(4)
        table[f'{name}_wrong'] = (above >= 0) != (films.label == 1)
    table['both_wrong'] = table.resnet18_wrong & table.efficientnet_wrong
    return table.merge(smaller_copies(edition), how='left', on='image_id')


def smaller_copies(edition):
    "Whether both ensembles of PneumoniaMNIST's networks err on the 28-pixel copy of a film: image_id, mnist_wrong"
    films, found = ensembles(edition, 'pneumoniamnist')
    wrong = [(found[name][0] >= 0) != (films.label == 1) for name in NAMES.values()]
    errors = pd.DataFrame(dict(image_id=films.image_id, mnist_wrong=np.all(wrong, 0)))
    matches = pneumoniamnist_matches()
    matches = matches[(matches.image_id != '') & (matches.file != '')]
    named = matches[['image_id', 'file']].merge(errors, on='image_id')
    return named.drop(columns='image_id').rename(columns=dict(file='image_id'))


def counts(table):  # From `film_table`
    "Name -> number of films: in each set, called wrong by each ensemble, by both, and expected by chance"
    found = {}
    for name in SETS:
        rows = table[table.set == name]
        found[f'{name}.films'] = len(rows)
        for ensemble in NAMES.values():
            found[f'{name}.{ensemble}'] = int(rows[f'{ensemble}_wrong'].sum())
        found[f'{name}.both'] = int(rows.both_wrong.sum())
        found[f'{name}.by_chance'] = rows.resnet18_wrong.mean() * rows.efficientnet_wrong.sum()
        found[f'{name}.also_small'] = int((rows.both_wrong & rows.mnist_wrong.eq(True)).sum())
        found[f'{name}.small_known'] = int((rows.both_wrong & rows.mnist_wrong.notna()).sum())
    for name in ('both', 'films', 'also_small', 'small_known'):
        found[f'all.{name}'] = sum(found[f'{part}.{name}'] for part in SETS)
    return found


def figures(edition, table, replicates):
    "Figures of each ensemble on all films, and without those that both call wrong"
    films, found = ensembles(edition, 'chest_xray')
    kept = dict(all=np.ones(len(films), bool), without=~table.both_wrong.to_numpy())
    entries = {}
    for part, rows in kept.items():
        label = films.label.to_numpy()[rows]
        weights = child_weights(films.patient_id[rows], replicates)
        one = np.ones((1, len(label)))
        for name, (above, _) in found.items():
            point = metrics(above[rows], label, one, 0)
            draws = metrics(above[rows], label, weights, 0)
            for metric in SHOWN:
                entries[f'{name}.{part}.{metric}'] = entry(point[metric][0], draws[metric])
    return entries


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--edition', type=Path, default=EDITION)
    parser.add_argument('--replicates', type=int, default=2000)
    parser.add_argument('--out', type=Path, default=EDITION)
    options = parser.parse_args(arguments)
    table = film_table(options.edition)
    entries = {
        name: dict(value=float(n), lower=None, upper=None) for name, n in counts(table).items()
    }
    entries |= figures(options.edition, table, options.replicates)
    with atomic_write(options.out / 'hard_films.csv') as file:
        table.to_csv(file, index=False)
    with atomic_write(options.out / 'hard_films.json') as file:
        file.write_text(to_json(dict(schema=1, figures=entries), indent=1) + '\n')


if __name__ == '__main__':
    main()
