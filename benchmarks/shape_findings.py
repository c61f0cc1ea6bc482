"""What width over height, the shape grid and covered films show, from committed logits alone; nothing is trained.

results/second_edition/shape.json gets every figure by name, with its interval:
  ratio.<set>.auc                     width over height alone as a classifier
  grid.<geometry>_<augmentation>.<set>.<metric>
  covered.<network>.<set>.<change>.<metric>, phantom.<change>.auc; `shipped` is the network in models/

A mean over seeds has the two-way interval over seeds and patients, everything else one over patients.

usage: shape_findings.py [--edition results/second_edition] [--replicates 2000]
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
from covered_films import BORDER, CHANGES, CORNER, FIXED, LUNGS, PHANTOM_CHANGES, film_rows
from second_edition_findings import Network, auc, networks_of, share
from second_edition_tables import films_of, read

from cxr_study.core.run import atomic_write, to_json
from cxr_study.data.match import test_part
from cxr_study.data.sets import phantom
from cxr_study.evaluate.intervals import resample_seeds, seeds_interval, wilson
from cxr_study.predict.decision import Calibration

EDITION = Path(__file__).parents[1] / 'results/second_edition'
MODELS = Path(__file__).parents[1] / 'models'
TEST = -2  # `fold` of a test film
KEYS = dict(
    distilled='distil-chest_xray-resnet18-wide-seed0',
    efficientnet='seeds-chest_xray-tf_efficientnetv2_b0-wide-seed0',
)


# --- Intervals ---


def measure(score, films, threshold):  # Logits [n]; table; threshold on the logit
    "Function of the patients' weights: AUC, sensitivity and specificity, where the films have the classes"
    code, _ = pd.factorize(films.patient_id)
    label = films.label.to_numpy()
    above = (score >= threshold).astype(float)

    def of_weights(weights):  # [replicates, patients]
        of_films = weights[:, code]
        found = {}
        if 0 in label:
            found['specificity'] = share(1 - above, of_films * (label == 0))
        if 1 in label:
            found['sensitivity'] = share(above, of_films * (label == 1))
        if len(found) == 2:
            found['auc'] = auc(score, label, of_films)
        return found

    return of_weights


def entries(measures, films, replicates):  # One of `measure` a seed
    "Metric -> entry: value, interval, values and SD of the seeds"
    patients = films.patient_id.nunique()
    found = {}
    for name, mean in resample_seeds(measures, patients, replicates).items():
        bounds = seeds_interval(mean)
        lower, upper = bounds.lower, bounds.upper
        value = float(mean.values.mean())
        if lower is None and len(measures) == 1 and name != 'auc':
            lower, upper = of_none_or_all(value, films, name)
        entry = dict(value=value, lower=lower, upper=upper)
        entry |= dict(n=len(films), patients=patients)
        if len(measures) > 1:
            entry |= dict(seeds=mean.values.tolist(), sd=float(mean.values.std(ddof=1)))
        found[name] = entry
    return found


def of_none_or_all(value, films, name):  # 0 or 1
    "Wilson's interval of a share that no bootstrap replicate can change"
    of_class = films[films.label == (name == 'sensitivity')]
    hit = np.full(len(of_class), value)
    lower, upper = wilson(hit, of_class.patient_id.to_numpy())
    return float(lower), float(upper)


# --- Films and their sets ---


def with_part(films):
    "Test films with `part`: common or other normals"
    test = films[films.fold == TEST].reset_index(drop=True)
    return test.assign(part=test_part(test.image_id))


def test_sets(test):  # From `with_part`
    "Set -> bool [n]: all, the common films, the other normals"
    common = (test.part == 'common').to_numpy()
    return {'test': np.ones(len(test), bool), 'common': common, 'others': ~common}


# --- Width over height alone ---


def ratio_figures(films, replicates):
    "AUC of the ratio, and the share of films on the right side of the best cut of training"
    train = films[(films.fold != TEST) & (films.fold != 0)].reset_index(drop=True)
    val = films[films.fold == 0].reset_index(drop=True)
    test = with_part(films)
    cut = best_cut(train.ratio.to_numpy(), train.label.to_numpy())
    sets = dict(train=train, val=val, common=test[test.part == 'common'])
    sets['others'] = test[(test.part != 'common') | (test.label == 1)]
    sets['test'] = test
    found = {'ratio.cut.value': only(cut)}
    for name, part in sets.items():
        measures = [measure(part.ratio.to_numpy(), part, cut)]
        for metric, entry in entries(measures, part, replicates).items():
            found[f'ratio.{name}.{metric}'] = entry
        for label, kind in ((0, 'normal'), (1, 'pneumonia')):
            median = float(part.ratio[part.label == label].median())
            found[f'ratio.{name}.median_{kind}'] = only(median)
    return found


def only(value):
    "An entry without an interval"
    return dict(value=value, lower=None, upper=None)


def best_cut(ratio, label):
    "The ratio with the largest sensitivity plus specificity"
    steps = np.unique(ratio)
    sick, well = np.sort(ratio[label == 1]), np.sort(ratio[label == 0])
    sensitivity = 1 - np.searchsorted(sick, steps) / len(sick)
    specificity = np.searchsorted(well, steps) / len(well)
    return float(steps[(sensitivity + specificity).argmax()])


# --- The grid ---


def grid_figures(facts, logits, films, replicates):
    "Metrics of each cell on each set; `_half`: at a threshold of one half, without a calibrator"
    found = {}
    for (_, _, cell), network in networks_of(facts, logits, films, 'grid').items():
        test = with_part(films['chest_xray'])
        for name, rows in test_sets(test).items():
            found |= prefixed(f'grid.{cell}.{name}', cell_figures(network, test, rows, replicates))
        val = network.val(0)
        plain = [measure(network.raw(i, 'val/plain'), val, 0) for i in range(len(network))]
        found |= prefixed(f'grid.{cell}.val', halved(entries(plain, val, replicates)))
    return found


def cell_figures(network, test, rows, replicates):
    "Metric -> entry of a cell on a set"
    part = test[rows].reset_index(drop=True)
    raw, calibrated = [], []
    for i in range(len(network)):
        raw.append(measure(network.raw(i, 'test/1')[rows], part, 0))
        calibrated.append(
            measure(network.calibrated(i, 'test/1')[rows], part, network.threshold(i))
        )
    return entries(calibrated, part, replicates) | halved(entries(raw, part, replicates))


def halved(found):
    "The metrics that depend on a threshold, under names that end in `_half`; AUC as it is"
    return {name if name == 'auc' else f'{name}_half': entry for name, entry in found.items()}


def prefixed(prefix, found):
    return {f'{prefix}.{name}': entry for name, entry in found.items()}


def where_trained(facts):
    "Cell -> list of (seed, device)"
    found = {}
    for entry in facts['jobs']:
        if entry['job']['part'] == 'grid':
            device = entry.get('device', 'GPU')
            found.setdefault(entry['job']['name'], []).append([entry['job']['seed'], device])
    return {cell: sorted(seeds) for cell, seeds in found.items()}


# --- Covered films ---


def decision_lines(edition, facts, logits, films):
    "Network -> (function from raw to calibrated logits, threshold in use)"
    first_edition = json.loads((edition / 'covered/first_edition.json').read_text())
    calibration = Calibration.from_dict(first_edition['calibration'])
    point = calibration.point(None)
    threshold = float(np.log(point.threshold / (1 - point.threshold)))
    found = dict(first_edition=(calibration.logit, threshold))
    for name, key in KEYS.items():
        jobs = [entry for entry in facts['jobs'] if entry['key'] == key]
        network = Network('chest_xray', jobs, logits, films['chest_xray'])
        slope, intercept = network.line(0)
        found[name] = (lambda z, a=slope, b=intercept: a * z + b), network.threshold(0)
    return found


def finished(logits):  # By network/split/change
    "The logits of each network and split for which all covers are there, and those of its marks if all are there"
    found = {}
    for start in dict.fromkeys(name.rsplit('/', 1)[0] for name in logits):
        for group in (FIXED, CHANGES):
            names = [f'{start}/{change}' for change in group]
            if all(name in logits for name in names):
                found |= {name: logits[name] for name in names}
    return found


def covered_figures(edition, lines, films, replicates):
    "Metrics of each network and split for which all covers, or covers and marks, are finished"
    found = {}
    with np.load(edition / 'covered/films.npz') as stored:
        logits = finished({name: z.astype(float) for name, z in stored.items()})
    test = with_part(films['chest_xray'])
    val = films['chest_xray'].iloc[film_rows(edition / 'call1')['val']].reset_index(drop=True)
    for key, z in logits.items():
        network, split, change = key.split('/')
        calibrate, threshold = lines[network]
        table, sets = (test, test_sets(test)) if split == 'test' else (val, dict(val=slice(None)))
        for name, rows in sets.items():
            part = table[rows].reset_index(drop=True)
            measures = [measure(calibrate(z[rows]), part, threshold)]
            figures = entries(measures, part, replicates)
            found |= prefixed(f"covered.{network}.{name}.{change.replace(' ', '_')}", figures)
    return found


def shipped_network(edition):
    "Which of the networks with covered films is the one in models/; None if none is"
    (file,) = MODELS.glob('*/bundle.json')
    bundle = json.loads(file.read_text())
    first_edition = json.loads((edition / 'covered/first_edition.json').read_text())
    if bundle['files']['model.onnx']['sha256'] == first_edition['network']:
        return 'first_edition'
    by_arch = dict(tf_efficientnetv2_b0='efficientnet', resnet18='distilled')
    return by_arch.get(bundle['network']['arch'])


def of_shipped(figures, shipped):  # From `covered_figures`; name of a network
    "The figures of the shipped network a second time, under the name `shipped`, which texts quote"
    start = f'covered.{shipped}.'
    return {
        name.replace(start, 'covered.shipped.', 1): entry
        for name, entry in figures.items()
        if name.startswith(start)
    }


def phantom_figures(edition, replicates):
    "AUC of the network that was trained on drawn films"
    path = edition / 'covered/phantoms.npz'
    found = {}
    table = phantom(images=1200, pixels=64).table
    test = table[table.official == 'test'].reset_index(drop=True)
    with np.load(path) as stored:
        for change in PHANTOM_CHANGES:
            z = stored[f'phantom/test/{change}'].astype(float)
            figures = entries([measure(z, test, 0)], test, replicates)
            found |= prefixed(f"phantom.{change.replace(' ', '_')}", figures)
    return found


# --- All ---


def calls(edition):
    "Folders with logits of trainings; `cpu` holds seeds of the grid that the GPU did not finish"
    names = ('call1', 'call2', 'cpu')
    return [edition / name for name in names if (edition / name / 'second_edition.json').exists()]


def read_calls(edition):
    "(facts, logits, films by data set) of all calls; trainings of `cpu` are marked as such"
    facts, logits = read(*calls(edition))
    if (edition / 'cpu').exists():
        own = json.loads((edition / 'cpu/second_edition.json').read_text())
        keys = {entry['key'] for entry in own['jobs']}
        for entry in facts['jobs']:
            entry['device'] = 'CPU' if entry['key'] in keys else 'GPU'
    films = films_of(facts, 'chest_xray')
    return facts, logits, dict(chest_xray=films.assign(wide=films.ratio >= 1.35))


def findings(edition=EDITION, replicates=2000):
    "What shape.json holds"
    facts, logits, films = read_calls(edition)
    figures = ratio_figures(films['chest_xray'], replicates)
    figures |= grid_figures(facts, logits, films, replicates)
    lines = decision_lines(edition, facts, logits, films)
    covered = covered_figures(edition, lines, films, replicates)
    shipped = shipped_network(edition)
    figures |= covered | of_shipped(covered, shipped)
    figures |= phantom_figures(edition, replicates)
    return dict(
        schema=1,
        method=f"bootstrap of patients, of seeds too where there are several; {replicates} replicates",
        seeds=where_trained(facts),
        shipped=shipped,
        regions=dict(lungs=LUNGS, border=BORDER, corner=CORNER),
        figures=figures,
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--edition', type=Path, default=EDITION)
    parser.add_argument('--replicates', type=int, default=2000)
    options = parser.parse_args(arguments)
    found = findings(options.edition, options.replicates)
    with atomic_write(options.edition / 'shape.json') as file:
        file.write_text(to_json(found, indent=1) + "\n")
    print(f"{len(found['figures'])} figures in {options.edition / 'shape.json'}")


if __name__ == '__main__':
    main()
