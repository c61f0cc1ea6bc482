"""How often intervals of a mean over seeds, of one network and of a difference of two recipes contain the truth.

Draws studies from populations whose true values can be calculated, and counts. In some, images have an extreme logit of
the wrong sign, as a film in a frame may get. Writes results/interval_coverage_seeds.csv.

usage: python benchmarks/interval_coverage.py [--studies 400] [--replicates 400] [--only POPULATION ...] [--out FILE]
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import ndtr
from scipy.stats import t as student

from cxr_study.core.run import atomic_write, root
from cxr_study.evaluate.intervals import (
    delong,
    interval,
    obuchowski_rockette,
    resample_seeds,
    seeds_interval,
)
from cxr_study.predict.decision import sigmoid

EXTREME = 12.0  # Logit of an extreme image, of the wrong sign


@dataclasses.dataclass(frozen=True)
class Population:
    "Patients, networks and images that a study draws from; logits of a class have variance 1"

    patients: int = 624
    images: float = 1.0  # Mean number of images of a patient (geometric)
    icc: float = 0.8  # Correlation of two images of a patient
    seeds: int = 5
    separation: float = 3.45  # Mean distance of the classes
    shared: float = 0.93  # Correlation of the logits of two seeds
    sd_separation: float = 0.1  # Of a seed's separation
    sd_offset: float = 0.08  # Of a seed's mean logit
    extreme: float = 0.0  # Share of images with an extreme logit of the wrong sign
    prevalence: float = 0.625


COMPARED = "one image a patient"  # Where two recipes are compared as well
SMALL = dict(patients=216, images=312 / 216, separation=2.93, shared=0.9, sd_offset=0.22)
POPULATIONS = {  # The first has the size of the published tests, the others half of it, which is harder
    "one image a patient": Population(),
    "one extreme image in a test": Population(patients=312, extreme=1 / 312),
    "three extreme images in a test": Population(patients=312, extreme=3 / 312),
    "several images a patient": Population(**SMALL, sd_separation=0.12),
    "networks that differ more": Population(**SMALL | dict(shared=0.65), sd_separation=0.3),
    "three seeds": Population(**SMALL, sd_separation=0.12, seeds=3),
}


# --- Truth


def _expected_brier(mean: float, variance: float) -> float:
    "Brier score of images whose logits have this mean towards their class, by Gauss-Hermite quadrature"
    x, weights = np.polynomial.hermite_e.hermegauss(199)
    logit = mean + np.sqrt(variance) * x
    return float(weights @ (1 - sigmoid(logit)) ** 2 / weights.sum())


def true_values(population: Population) -> dict[str, float]:
    "AUC, sensitivity at a threshold of one half and Brier score, over all networks and patients"
    d = population.separation
    usual = 1 - population.extreme
    of_separation = population.sd_separation**2
    variance = 1 + of_separation / 4 + population.sd_offset**2
    wrong = (1 - sigmoid(-EXTREME)) ** 2
    brier = usual * _expected_brier(d / 2, variance) + population.extreme * wrong
    return dict(
        auc=usual**2 * ndtr(d / np.sqrt(2 + of_separation)),
        sensitivity=usual * ndtr(d / 2 / np.sqrt(variance)),
        brier=brier,
    )


def values_of_network(population: Population, separation: float, offset: float) -> dict:
    "The same of one network, over all patients"
    usual = 1 - population.extreme
    wrong = (1 - sigmoid(-EXTREME)) ** 2
    of_positive = _expected_brier(separation / 2 + offset, 1)
    of_negative = _expected_brier(separation / 2 - offset, 1)
    share = population.prevalence
    brier = usual * (share * of_positive + (1 - share) * of_negative)
    return dict(
        auc=usual**2 * ndtr(separation / np.sqrt(2)),
        sensitivity=usual * ndtr(separation / 2 + offset),
        brier=brier + population.extreme * wrong,
    )


# --- One study


@dataclasses.dataclass(frozen=True)
class Study:
    "A test and the logits of several networks on it"

    label: np.ndarray  # Bool [images]
    patient: np.ndarray  # 0 .. patients-1, int [images]
    logits: np.ndarray  # Float [seeds, images]

    @property
    def patients(self) -> int:
        return int(self.patient.max()) + 1


def _networks(population, label, common, extreme, rng):
    "Logits of all seeds, float [seeds, images], and the true values of the first"
    seeds = (population.seeds, 1)
    separation = population.separation + population.sd_separation * rng.normal(size=seeds)
    offset = population.sd_offset * rng.normal(size=seeds)
    own = rng.normal(size=(population.seeds, len(label)))
    noise = np.sqrt(population.shared) * common + np.sqrt(1 - population.shared) * own
    logits = separation * (label - 0.5) + offset + noise
    true = values_of_network(population, separation[0, 0], offset[0, 0])
    return np.where(extreme, np.where(label, -EXTREME, EXTREME), logits), true


def draw(population: Population, seed: int) -> tuple[Study, Study, dict]:
    "A study, another recipe's networks on the same test, and the true values of the first network"
    rng = np.random.default_rng(seed)
    size = rng.geometric(1 / population.images, population.patients)
    patient = np.repeat(np.arange(population.patients), size)
    label = (rng.random(population.patients) < population.prevalence)[patient]
    of_patient = rng.normal(size=population.patients)[patient]
    of_image = rng.normal(size=len(patient))
    common = np.sqrt(population.icc) * of_patient + np.sqrt(1 - population.icc) * of_image
    extreme = rng.random(len(patient)) < population.extreme
    first, of_first = _networks(population, label, common, extreme, rng)
    second, _ = _networks(population, label, common, extreme, rng)
    return Study(label, patient, first), Study(label, patient, second), of_first


def measure(study: Study, k: int) -> Callable:
    """The three metrics of seed k as a function of the patients' weights.

    The AUC is a form of a matrix of pairs of patients: much faster than sorting for each replicate."""
    z = study.logits[k]
    positive, negative = study.label, ~study.label
    pairs = (z[positive][:, None] > z[negative]).astype(np.float32)
    error = (sigmoid(z) - study.label) ** 2
    found = (z >= 0)[positive].astype(float)

    def values(weights):
        w = weights[:, study.patient].astype(np.float32)  # Whole numbers
        of_positive, of_negative = w[:, positive], w[:, negative]
        number = of_positive.sum(1)
        area = ((of_positive @ pairs) * of_negative).sum(1) / (number * of_negative.sum(1))
        return dict(auc=area, sensitivity=of_positive @ found / number, brier=w @ error / w.sum(1))

    return values


# --- Its intervals


def both(first: Callable, second: Callable) -> Callable:  # From `measure`
    "A measure of two recipes: the metrics of the first, and its difference from the second"

    def values(weights):
        one, other = first(weights), second(weights)
        differences = {f'difference {name}': one[name] - other[name] for name in one}
        return one | differences

    return values


def students_interval(values: np.ndarray) -> tuple[float, float]:  # One a seed
    "The interval of a mean that knows of the seeds alone"
    half_width = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return values.mean() - half_width, values.mean() + half_width


TWO_WAY = "mean: two-way bootstrap"
PERCENTILE = "mean: two-way bootstrap, percentile"
READERS = "mean: Obuchowski-Rockette"
STUDENT = "mean: Student's t over seeds"
ALONE = "one network: bootstrap of patients, for that network"
DIFFERENCE = "difference of two recipes: two-way bootstrap"


def intervals(first: Study, second: Study | None, replicates: int, seed: int) -> dict:
    "(method, metric) -> (lower, upper), from the functions that the study uses"
    measures = [measure(first, k) for k in range(len(first.logits))]
    alone = resample_seeds(measures[:1], first.patients, replicates, seed)
    if second:
        others = [measure(second, k) for k in range(len(second.logits))]
        measures = [both(one, other) for one, other in zip(measures, others)]
    bounds = {}
    for name, mean in resample_seeds(measures, first.patients, replicates, seed).items():
        if name.startswith('difference'):
            metric = name.removeprefix('difference ')
            bounds[DIFFERENCE, metric] = seeds_interval(mean)[:2]
        else:
            bounds[TWO_WAY, name] = seeds_interval(mean)[:2]
            bounds[PERCENTILE, name] = interval(mean.values.mean(), mean.draws)[:2]
            bounds[STUDENT, name] = students_interval(mean.values)
    covariance = delong(first.label, first.logits, first.patient)
    bounds[READERS, 'auc'] = obuchowski_rockette(*covariance)[:2]
    for name, value in alone.items():
        bounds[ALONE, name] = seeds_interval(value)[:2]
    return bounds


def hits(population: Population, seed: int, replicates: int, differences: bool) -> dict:
    "(method, metric) -> whether the interval of one study contains the truth"
    first, second, of_first = draw(population, seed)
    of_recipe = true_values(population)
    bounds = intervals(first, second if differences else None, replicates, seed)
    contained = {}
    for (method, metric), (lower, upper) in bounds.items():
        truth = of_recipe[metric]
        if method == DIFFERENCE:
            truth = 0.0
        if method == ALONE:
            truth = of_first[metric]
        contained[method, metric] = lower is not None and lower <= truth <= upper
    return contained


def coverage(name: str, studies: int, replicates: int) -> pd.DataFrame:
    "Share of studies whose interval contains the truth: a row a method, a column a metric"
    differences = name == COMPARED
    rows = [hits(POPULATIONS[name], seed, replicates, differences) for seed in range(studies)]
    shares = pd.DataFrame(rows).mean()
    shares.index = pd.MultiIndex.from_tuples(shares.index)
    return shares.unstack(sort=False)[['auc', 'sensitivity', 'brier']].assign(studies=studies)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--studies', type=int, default=400)
    parser.add_argument('--replicates', type=int, default=400)
    parser.add_argument('--only', choices=POPULATIONS, help="Compute these anew", nargs='*')
    parser.add_argument('--out', type=Path, default=root() / 'results/interval_coverage_seeds.csv')
    options = parser.parse_args()
    tables = {}
    if options.only and options.out.is_file():
        known = pd.read_csv(options.out).set_index(['population', 'method'])
        tables = {name: known.loc[name] for name in known.index.unique('population')}
    for name in options.only or POPULATIONS:
        tables[name] = coverage(name, options.studies, options.replicates)
        print(name, tables[name].round(3), sep="\n", flush=True)
        whole = pd.concat(tables, names=['population', 'method'])
        with atomic_write(options.out) as file:
            whole.to_csv(file, float_format='%.3f')


if __name__ == '__main__':
    main()
