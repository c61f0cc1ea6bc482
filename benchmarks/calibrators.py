"""The comparison of calibrators of ANALYSIS_PLAN.md, section 5, on committed logits; nothing is trained.

Each calibrator is fitted on validation as it is, and on the plan's seven versions of it, each film with the same
weight. Platt on seven versions was declared before any test was opened and stays what is shipped. OUT gets
calibrators.json, whose `figures` are named
  <network>.<set>.<way>.<metric>                    mean over seeds; intervals over seeds and children
  <network>.ensemble.<set>.<way>.<metric>           mean of the members' calibrated logits; intervals over children
  <network>.<set>.<way>.<metric>_less_shipped       difference from Platt on seven versions, paired
  <network>.<set>.<calibrator>.<metric>_seven_less_plain
  <network>.line.<fitted on>.<what>                 slope and intercept of Platt's calibrator, mean over seeds
  <data set>.<set>.pneumonia                        share of pneumonias
  <network>.<way>.ece_15                            calibration error in 15 equal bins on the 624, mean over seeds
  <network>.local.<number of cases>.<what>          recalibration from local cases, as on the page 06_recalibration
A way is `raw` or <calibrator>.plain or <calibrator>.seven; a set is the data set's 624 (all), common or val.
On val, validation as it is, calibrators are judged on the films that they were fitted on.

usage: calibrators.py [--edition results/second_edition] [--replicates 2000] [--draws 100]
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from second_edition_films import VERSIONS, WIDE
from second_edition_findings import ECE_REPLICATES, child_weights, ece, entry, networks_of, share
from second_edition_tables import films_of, read
from sklearn.isotonic import isotonic_regression

from cxr_study.calibrate.calibrators import fit_calibrator
from cxr_study.core.run import atomic_write, root, to_json
from cxr_study.data.match import test_part
from cxr_study.evaluate.intervals import two_way
from cxr_study.predict.decision import log_odds, sigmoid

sys.path.insert(0, str(root() / 'tools'))
from notebook_functions import functions_of

EDITION = root() / 'results/second_edition'
DATA = ('chest_xray', 'pneumoniamnist')
FITTED_ON = dict(plain=('plain',), seven=VERSIONS)
KINDS = ('temperature', 'platt', 'beta', 'isotonic', 'venn_abers')
SHIPPED = 'platt.seven'
WAYS = ('raw', *(f'{kind}.{fitted}' for kind in KINDS for fitted in FITTED_ON))
SETS = ('all', 'common', 'val')
METRICS = ('brier', 'log_loss', 'ece')


def venn_abers(logit, label, new):  # Calibration logits and labels [n]; logits [m]
    """Probabilities [m] of inductive Venn-Abers prediction, p1 / (1 - p0 + p1) (Vovk, Petej and Fedorova 2015).

    p0 and p1 are what isotonic regression gives a new film when it joins the calibration films with label 0 and 1"""
    scores, place = np.unique(logit, return_inverse=True)
    films = np.bincount(place).astype(float)
    mean = np.bincount(place, label) / films
    asked, back = np.unique(new, return_inverse=True)
    position = np.searchsorted(scores, asked)
    known = np.append(scores, np.nan)[position] == asked
    cases, case = np.unique(np.stack([position, known]), axis=1, return_inverse=True)
    found = np.empty(cases.shape[1])
    for i, (at, tied) in enumerate(cases.T):
        p0, p1 = (_joined(mean, films, at, tied, y) for y in (0, 1))
        found[i] = p1 / (1 - p0 + p1)
    return found[case.ravel()][back]


def _joined(mean, films, at, tied, y):
    "The isotonic value at a position when a film with label `y` joins"
    if tied:
        films, mean = films.copy(), mean.copy()
        mean[at] = (mean[at] * films[at] + y) / (films[at] + 1)
        films[at] += 1
    else:
        mean, films = np.insert(mean, at, y), np.insert(films, at, 1.0)
    return isotonic_regression(mean, sample_weight=films)[at]


def networks(edition):  # Folder
    "Name such as chest_xray-resnet18 -> `Network`, all seeds"
    facts, logits = read(*sorted(Path(edition).glob('call*')))
    films = {}
    for data in DATA:
        table = films_of(facts, data)
        part = test_part(table.image_id) if data == 'chest_xray' else None
        common = (part == 'common') if part is not None else table.ratio.notna()
        films[data] = table.assign(
            wide=table.ratio >= WIDE, set=np.where(common | (table.label == 1), 'common', 'others')
        )
    found = networks_of(facts, logits, films, 'seeds')
    return {f'{data}-{arch}': network for (data, arch, _), network in sorted(found.items())}


def fitted_logits(network, i, name):  # `Network`; a seed's number; such as test/1
    "Way -> calibrated logits of one seed"
    asked = network.raw(i, name)
    found = dict(raw=asked)
    for fitted, versions in FITTED_ON.items():
        val = network.val(i)
        tables = [val.assign(logit=network.raw(i, f'val/{v}')) for v in versions]
        table = pd.concat(tables, ignore_index=True)
        for kind in KINDS:
            if kind == 'platt':  # As the plan fits it
                z = network.calibrated(i, name, versions)
            elif kind == 'venn_abers':
                z = log_odds(venn_abers(table.logit.to_numpy(), table.label.to_numpy(), asked))
            else:
                z = fit_calibrator(kind, table, quiet=True)(asked)
            found[f'{kind}.{fitted}'] = z
    return found


def draws_of(z, films, weights):  # Logits [n]; table; [replicates, n]
    "Metric -> one a replicate; the calibration error of the first replicates alone"
    y = films.label.to_numpy()
    return dict(
        brier=share((sigmoid(z) - y) ** 2, weights),
        log_loss=share(np.logaddexp(0, np.where(y == 1, -z, z)), weights),
        ece=ece(z, films, weights[:ECE_REPLICATES]),
    )


def measured(logits, films, replicates):  # Way -> logits [n] of each member
    "(way, metric) -> (points [members], draws [members, replicates])"
    one, weights = np.ones((1, len(films))), child_weights(films.patient_id, replicates)
    found = {}
    for way, members in logits.items():
        points = [draws_of(z, films, one) for z in members]
        draws = [draws_of(z, films, weights) for z in members]
        for metric in METRICS:
            each = np.array([p[metric][0] for p in points])
            found[way, metric] = each, np.stack([d[metric] for d in draws])
    return found


def entries_of(found):  # From `measured`
    "Name -> entry: each way, its difference from the one shipped, and seven versions less plain validation"
    entries = {}

    def add(name, points, draws):
        entries[name] = entry(points.mean(), two_way(draws), points)

    for (way, metric), (points, draws) in found.items():
        add(f'{way}.{metric}', points, draws)
        if way != SHIPPED:
            shipped = found[SHIPPED, metric]
            add(f'{way}.{metric}_less_shipped', points - shipped[0], draws - shipped[1])
        if way.endswith('.seven'):
            kind = way.removesuffix('.seven')
            plain = found[f'{kind}.plain', metric]
            add(f'{kind}.{metric}_seven_less_plain', points - plain[0], draws - plain[1])
    return entries


def rows_of(network, part):  # `Network`; name of a set
    "(films of the set, name of their logits, which rows of these logits)"
    if part == 'val':
        films = network.val(0)
        return films, 'val/plain', np.ones(len(films), bool)
    rows = network.rows(part)
    return network.test[rows], 'test/1', rows


def compared(group, replicates):  # Name -> `Network`, of one data set
    "All entries of one data set: each network, its ensemble, and the ensemble of all"
    entries = {}
    logits = {
        (name, file): [fitted_logits(n, i, file) for i in range(len(n))]
        for name, n in group.items()
        for file in ('val/plain', 'test/1')
    }
    first = next(iter(group.values()))
    together = f'{first.data}-together'
    for part in SETS:
        films, file, rows = rows_of(first, part)
        entries[f'{first.data}.{part}.pneumonia'] = number(films.label.mean())
        members = {name: logits[name, file] for name in group}
        members[together] = [z for seeds in members.values() for z in seeds]
        for name, seeds in members.items():
            each = {way: [z[way][rows] for z in seeds] for way in WAYS}
            mean = {way: [np.mean(z, 0)] for way, z in each.items()}
            if name != together:
                found = entries_of(measured(each, films, replicates))
                entries |= {f'{name}.{part}.{k}': e for k, e in found.items()}
            found = entries_of(measured(mean, films, replicates))
            found = {k: e for k, e in found.items() if '_less_' not in k}
            entries |= {f'{name}.ensemble.{part}.{k}': e for k, e in found.items()}
    return entries


def number(value):  # Or None
    "An entry without an interval"
    return dict(value=None if value is None else float(value), lower=None, upper=None)


def line_entries(network):  # `Network`
    "Name -> slope and intercept of Platt's calibrator, mean over seeds"
    entries = {}
    for fitted, versions in FITTED_ON.items():
        lines = np.array([network.line(i, versions) for i in range(len(network))])
        for k, name in enumerate(('slope', 'intercept')):
            entries[f'{fitted}.{name}'] = number(lines[:, k].mean())
    return entries


def ece_15(z, y):  # Logits and labels [n]
    "Calibration error of the probability of pneumonia in 15 bins of equal width, as CalArena measures it"
    p = sigmoid(z)
    place = np.minimum((15 * p).astype(int), 14)
    gaps = np.bincount(place, y, 15) - np.bincount(place, p, 15)
    return np.abs(gaps).sum() / len(z)


def ece_15_entries(network):  # `Network`
    "Name -> entry on the 624, mean over seeds"
    y = network.test.label.to_numpy()
    logits = [fitted_logits(network, i, 'test/1') for i in range(len(network))]
    return {f'{way}.ece_15': number(np.mean([ece_15(z[way], y) for z in logits])) for way in WAYS}


def local_entries(network, draws):  # `Network`; draws of cases a seed
    "Name -> entry of recalibration from local cases of the 624, after the shipped calibrator"
    page = functions_of('results/06_recalibration')
    curves = []
    for i in range(len(network)):
        table = network.test.assign(split='test', logit=network.calibrated(i, 'test/1'))
        curves.append(page.local_curve(table, draws=draws).assign(seed=i))
    curve = pd.concat(curves, ignore_index=True)
    needed, helps = page.cases_needed(curve)
    entries = {'needed': needed}
    for k, part in curve.groupby('k'):
        entries[f'{k}.helps'] = helps[k]
        for way, rows in part.groupby('way'):
            entries |= {f'{k}.{way}.{metric}': rows[metric].mean() for metric in METRICS}
    return {k: number(v) for k, v in entries.items()}


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--edition', type=Path, default=EDITION)
    parser.add_argument('--replicates', type=int, default=2000)
    parser.add_argument('--draws', type=int, default=100)
    parser.add_argument('--out', type=Path, default=EDITION)
    options = parser.parse_args(arguments)
    found, entries = networks(options.edition), {}
    for data in DATA:
        group = {name: n for name, n in found.items() if n.data == data}
        entries |= compared(group, options.replicates)
    for name, network in found.items():
        local = local_entries(network, options.draws)
        entries |= {f'{name}.local.{k}': e for k, e in local.items()}
        entries |= {f'{name}.line.{k}': e for k, e in line_entries(network).items()}
        entries |= {f'{name}.{k}': e for k, e in ece_15_entries(network).items()}
    with atomic_write(options.out / 'calibrators.json') as file:
        file.write_text(to_json(dict(schema=1, figures=entries), indent=1) + '\n')


if __name__ == '__main__':
    main()
