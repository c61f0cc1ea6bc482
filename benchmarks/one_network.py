"""The shipped network beside its teacher, the distilled one and plain seeds; and how many children training needs.

one_network.json is written, name -> entry, in the form that texts quote:
  WHO.val.METRIC, WHO.SET.METRIC        WHO: shipped (EfficientNetV2-B0 seed 0), distilled (ResNet-18), teacher (mean of
                                        the six teachers' calibrated logits), plain (ResNet-18, mean over its seeds),
                                        efficientnet (the same of EfficientNetV2-B0)
  plain.first_five.sd, plain.last_five.sd
                                        SD of specificity on the test over seeds 0 to 4 and 5 to 9
  shipped_less_distilled.test.METRIC    paired in children
  curve.PERCENT.METRIC                  learning curve at 64 px over PERCENT of the training children, validation alone
  small.WHO.val.METRIC, small.WHO.SET.METRIC, small.teacher_auc, small.auc_below_teacher
                                        five distilled ResNet-18s and five plain ones at 64 px
  large.WHO...                          the same at 224 px (H7), beside ten plain ones
Nothing is trained or chosen.

usage: one_network.py [--out FILE] [--replicates 2000]
"""

import argparse
import json
from pathlib import Path

import numpy as np
from learning_curve import part_of
from second_edition import Job, finite
from second_edition_films import WIDE
from second_edition_findings import (
    Network,
    against,
    ensemble_of,
    entry,
    networks_of,
    over_seeds,
    share,
    spread,
    table_of,
    teachers_of,
    threshold_in_use,
    validation_auc,
)
from second_edition_findings import auc as weighted_auc
from second_edition_tables import films_of, read
from shape_findings import calls, prefixed

from cxr_study.core.run import atomic_write, root, to_json
from cxr_study.data.match import test_part

EDITION = root() / 'results/second_edition'
SHIPPED = 'seeds-chest_xray-tf_efficientnetv2_b0-wide-seed0'
SETS = dict(test='all', common='common', others='the 66')
CURVE = EDITION / 'curve'
SMALL = EDITION / 'small'
WHOLE = 'squash_stretch'  # The grid's cell that trains on all children


def chest_films(facts):
    "Films of chest_xray with `wide`, and `set` of the test films"
    films = films_of(facts, 'chest_xray')
    common = test_part(films.image_id) == 'common'
    return films.assign(wide=films.ratio >= WIDE, set=np.where(common, 'common', 'the 66'))


# --- Networks ---


def on_validation(z, threshold, val, replicates):  # Calibrated logits, a row a seed [seeds, n]
    "Metric -> entry on validation as it is, at each seed's threshold in use"
    y = val.label.to_numpy()
    measures = dict(
        auc=lambda i, w: weighted_auc(z[i], y, w),
        sensitivity=lambda i, w: share((z[i] >= threshold[i]).astype(float), w * y),
        specificity=lambda i, w: share((z[i] < threshold[i]).astype(float), w * (1 - y)),
    )
    return {
        name: over_seeds(value, len(z), val.patient_id, replicates)
        for name, value in measures.items()
    }


def figures_of(network, replicates):
    "Name -> entry of the mean over a network's seeds"
    count = range(len(network))
    z = [network.calibrated(i, 'val/plain') for i in count]
    thresholds = [network.threshold(i) for i in count]
    found = prefixed('val', on_validation(z, thresholds, network.val(0), replicates))
    criteria = np.array([job['criterion'] for job in network.jobs])
    of_seeds = dict(lowest=float(criteria.min()), highest=float(criteria.max()))
    found['val.criterion'] = entry(criteria.mean(), criteria[:0], criteria) | of_seeds
    for name, part in SETS.items():
        found |= prefixed(name, table_of(network, part, replicates))
    return found


def figures_of_teacher(members, replicates):  # A `Network` a teacher
    "Name -> entry of the mean of the teachers' calibrated logits"
    val = members[0].val(0)
    z = np.mean([network.calibrated(0, 'val/plain') for network in members], 0)
    found = prefixed('val', on_validation([z], [threshold_in_use(z, val)], val, replicates))
    for name, part in SETS.items():
        found |= prefixed(name, ensemble_of(members, part, replicates))
    return found


def network_figures(replicates):
    "Figures of the shipped network, of those beside it and of five distillations"
    facts, logits = read(*sorted(EDITION.glob('call*')))
    films = chest_films(facts)

    def of_jobs(jobs):
        return Network('chest_xray', jobs, logits, films)

    by_seed = {
        entry['job']['seed']: entry for entry in facts['jobs'] if entry['job']['part'] == 'distil'
    }
    distilled = of_jobs([by_seed.pop(0)])  # The GPU's
    teachers = teachers_of(distilled, 0, facts)
    seeds = networks_of(
        facts, logits, dict.fromkeys(['chest_xray', 'pneumoniamnist'], films), 'seeds'
    )
    (shipped,) = [entry for entry in facts['jobs'] if entry['key'] == SHIPPED]
    shipped = of_jobs([shipped])
    found = prefixed('shipped', figures_of(shipped, replicates))
    found |= prefixed('distilled', figures_of(distilled, replicates))
    for who, arch in dict(plain='resnet18', efficientnet='tf_efficientnetv2_b0').items():
        found |= prefixed(who, figures_of(seeds['chest_xray', arch, 'wide'], replicates))
    jobs = seeds['chest_xray', 'resnet18', 'wide'].jobs
    for name, five in dict(first_five=jobs[:5], last_five=jobs[5:]).items():
        found[f'plain.{name}.sd'] = dict(value=spread(of_jobs(five)), lower=None, upper=None)
    found |= prefixed('teacher', figures_of_teacher(teachers, replicates))
    for metric in ('auc', 'specificity', 'brier'):
        difference = against(shipped, distilled, metric, replicates)
        found[f'shipped_less_distilled.test.{metric}'] = difference
    if by_seed:
        five = of_jobs([by_seed[seed] for seed in sorted(by_seed)])
        found |= prefixed('large', distillations(teachers_of(five, 0, facts), five, replicates))
    return found


# --- Five distillations ---


def distillations(teachers, distilled, replicates):  # A `Network` a teacher; `Network`
    "Figures of distilled networks with the same teachers, and their distance from these on validation"
    teacher = validation_auc(teachers)
    below = np.array([teacher - job['valid_auc'] for job in distilled.jobs])
    return prefixed('distilled', figures_of(distilled, replicates)) | dict(
        teacher_auc=dict(value=teacher, lower=None, upper=None),
        auc_below_teacher=entry(below.mean(), below[:0], below),
    )


def small_networks():
    "(teachers, a `Network` each; the distilled; the plain ones, which are a cell of the shape grid)"
    facts, logits = read(*calls(EDITION))
    films = chest_films(facts)
    plain = [job for job in facts['jobs'] if job['job']['name'] == WHOLE]
    here = {}
    jobs = []
    for part in ('teach', 'distil'):
        jobs += json.loads((SMALL / part / 'second_edition.json').read_text())['jobs']
        with np.load(SMALL / part / 'seeds.npz') as stored:
            here |= dict(stored)

    def of(part):
        found = [job for job in jobs if job['job']['part'] == part]
        return sorted(found, key=seed_of)

    teachers = [Network('chest_xray', [job], here, films) for job in of('teach')]
    distilled = Network('chest_xray', of('distil'), here, films)
    return teachers, distilled, Network('chest_xray', sorted(plain, key=seed_of), logits, films)


def small_figures(replicates):
    "The same at 64 px, and figures of five plain networks"
    teachers, distilled, plain = small_networks()
    found = distillations(teachers, distilled, replicates)
    return prefixed('small', found | prefixed('plain', figures_of(plain, replicates)))


# --- Learning curve ---


def curve_networks():
    "Percent of the training children -> `Network` of its seeds"
    facts, logits = read(*calls(EDITION))
    films = chest_films(facts)
    whole = [job for job in facts['jobs'] if job['job']['name'] == WHOLE]
    found = {100: Network('chest_xray', sorted(whole, key=seed_of), logits, films)}
    facts = json.loads((CURVE / 'second_edition.json').read_text())
    with np.load(CURVE / 'seeds.npz') as stored:
        logits = dict(stored)
    parts = sorted({part_of(Job(**job['job'])) for job in facts['jobs']})
    for part in parts:
        jobs = [job for job in facts['jobs'] if part_of(Job(**job['job'])) == part]
        found[round(100 * part)] = Network('chest_xray', sorted(jobs, key=seed_of), logits, films)
    return found


def seed_of(job):
    return job['job']['seed']


def curve_figures(replicates):
    "Figures of each part on validation, with the numbers of children and films"
    found = {}
    for percent, network in curve_networks().items():
        start = f'curve.{percent}'
        count = range(len(network))
        z = [network.calibrated(i, 'val/plain') for i in count]
        thresholds = [network.threshold(i) for i in count]
        found |= prefixed(start, on_validation(z, thresholds, network.val(0), replicates))
        criteria = np.array([job['criterion'] for job in network.jobs])
        found[f'{start}.criterion'] = entry(criteria.mean(), criteria[:0], criteria)
        films = np.mean([job['films'] for job in network.jobs])
        found[f'{start}.films'] = dict(value=float(films), lower=None, upper=None)
    return found


def all_figures(replicates):
    "What one_network.json holds"
    figures = network_figures(replicates)
    if CURVE.exists():
        figures |= curve_figures(replicates)
    if SMALL.exists():
        figures |= small_figures(replicates)
    return figures


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', type=Path, default=EDITION / 'one_network.json')
    parser.add_argument('--replicates', type=int, default=2000)
    options = parser.parse_args()
    figures = all_figures(options.replicates)
    method = f"bootstrap of patients, of seeds too where there are several; {options.replicates} replicates"
    with atomic_write(options.out) as file:
        file.write_text(
            to_json(finite(dict(schema=1, method=method, figures=figures)), indent=1) + '\n'
        )


if __name__ == '__main__':
    main()
