"""What ANALYSIS_PLAN.md asks of the logits: goals, hypotheses and the ladder of candidates, with intervals.

A FOLDER holds what one call of second_edition.py wrote. findings.json and findings.md are written; nothing is chosen.

usage: second_edition_findings.py FOLDER [FOLDER ...] --matches chest_xray_matches.csv --out OUT [--replicates 2000]
"""

import argparse
import json
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import spearmanr
from second_edition_films import SHAPES, VERSIONS, WIDE
from second_edition_rule import NEAR, platt_line
from second_edition_tables import TEST, films_of, read

from cxr_study.calibrate.measures import ece_debiased
from cxr_study.core.run import atomic_write, to_json
from cxr_study.evaluate.intervals import two_way
from cxr_study.evaluate.metrics import scored

SENSITIVITY = 0.97  # Of the threshold in use, at least, on validation
ECE_REPLICATES = 200  # Each fits a line
SETS = dict(chest_xray=('all', 'common', 'the 66'), pneumoniamnist=('all', 'common', 'the 67'))
GOALS = {  # Set -> metric -> (direction, goal)
    ('chest_xray', 'all'): dict(
        auc=(1, 0.985), accuracy=(1, 0.93), brier=(-1, 0.065), ece=(-1, 0.06)
    ),
    ('chest_xray', 'common'): dict(
        auc=(1, 0.994), accuracy=(1, 0.96), specificity=(1, 0.9), sensitivity=(1, 0.97)
    ),
    ('chest_xray', 'the 66'): dict(specificity=(1, 0.65)),
    ('pneumoniamnist', 'all'): dict(
        auc=(1, 0.991), accuracy=(1, 0.95), brier=(-1, 0.045), ece=(-1, 0.04)
    ),
    ('pneumoniamnist', 'common'): dict(
        auc=(1, 0.994), accuracy=(1, 0.96), specificity=(1, 0.9), sensitivity=(1, 0.97)
    ),
}


# Statistics


def child_weights(children, replicates, seed=0):
    "[replicates, films]: how often each film is drawn when children are drawn with replacement"
    code, names = pd.factorize(np.asarray(children))
    drawn = np.random.default_rng(seed).multinomial(
        len(names), np.full(len(names), 1 / len(names)), replicates
    )
    return drawn[:, code].astype(float)


def share(hit, weights):
    "Weighted share of films [n] that are hits, one a replicate; NaN without films"
    total = weights.sum(1)
    return np.divide(weights @ hit, total, out=np.full(len(weights), np.nan), where=total > 0)


def auc(z, y, weights):
    "Weighted area under the ROC curve, one a replicate; ties count half"
    order = np.argsort(z, kind='stable')
    z, y, w = z[order], y[order], weights[:, order]
    well = np.cumsum(np.c_[np.zeros(len(w)), w * (1 - y)], 1)
    below, upto = well[:, np.searchsorted(z, z, 'left')], well[:, np.searchsorted(z, z, 'right')]
    sick = w * y
    pairs = sick.sum(1) * well[:, -1]
    return np.divide(
        (sick * (below + upto) / 2).sum(1), pairs, out=np.full(len(w), np.nan), where=pairs > 0
    )


def metrics(
    z, y, weights, threshold
):  # Calibrated logits [n]; labels [n]; [replicates, n]; on the logit
    "Metric -> one a replicate"
    sick, well = weights * y, weights * (1 - y)
    found = dict(auc=auc(z, y, weights))
    for name, called in (('', z >= threshold), ('_half', z >= 0)):
        found[f'accuracy{name}'] = share((called == y).astype(float), weights)
        found[f'sensitivity{name}'] = share(called.astype(float), sick)
        found[f'specificity{name}'] = share((~called).astype(float), well)
    found['brier'] = brier(z, y, weights)
    found['log_loss'] = share(np.logaddexp(0, np.where(y == 1, -z, z)), weights)
    return found


def brier(z, y, weights):
    return share((1 / (1 + np.exp(-z)) - y) ** 2, weights)


def ece(z, films, weights):
    "Debiased calibration error, one a replicate"
    if films.label.nunique() < 2:
        return np.full(len(weights), np.nan)
    s = scored(films[['image_id', 'patient_id', 'label']].assign(split='test', logit=z))
    return ece_debiased(s, weights[:, np.argsort(-z, kind='stable')])


def entry(point, draws, each=None):  # Value; one a replicate; one a seed
    "Value with its interval, and the SD over seeds"
    kept = draws[np.isfinite(draws)]
    lower, upper = np.percentile(kept, [2.5, 97.5]) if len(kept) else (np.nan, np.nan)
    spread = (
        {}
        if each is None
        else dict(seeds=len(each), sd=float(np.std(each, ddof=1)) if len(each) > 1 else None)
    )
    return dict(value=float(point), lower=float(lower), upper=float(upper), **spread)


def threshold_in_use(z, val):  # Calibrated logits of validation, plain; its films
    "The threshold on the logit of section 5"
    y, wide = val.label.to_numpy(), val.wide.to_numpy(bool)
    groups = [g for g in (z[(y == 0) & wide], z[(y == 0) & ~wide]) if len(g)]
    sick, steps = np.sort(z[y == 1]), np.unique(z)
    sensitivity = 1 - np.searchsorted(sick, steps) / len(sick)
    specificity = np.mean([np.searchsorted(np.sort(g), steps) / len(g) for g in groups], 0)
    gain = np.where(sensitivity >= SENSITIVITY, sensitivity + specificity, -1)
    best = int(gain.argmax())
    return float((steps[best] + steps[max(best - 1, 0)]) / 2)


# Networks


class Network:
    "The trainings of one network or recipe, in order of the seed, with their films"

    def __init__(self, data, jobs, logits, films, look=lambda key: key):
        self.data, self.jobs, self.films = data, jobs, films
        self.test = films[films.fold == TEST].reset_index(drop=True)
        self.look, self.logits = look, logits

    def __len__(self):
        return len(self.jobs)

    def val(self, i):
        return self.films[self.films.fold == self.jobs[i]['job']['fold']].reset_index(drop=True)

    @cache
    def raw(self, i, name):
        "Logits of a training; `name` such as val/plain"
        key = self.jobs[i]['key']
        return self.logits[f"{key if name.startswith('val') else self.look(key)}/{name}"].astype(
            float
        )

    @cache
    def line(self, i, names=VERSIONS):
        "(slope, intercept) of Platt's calibrator on these versions"
        return platt_line({v: self.raw(i, f'val/{v}') for v in names}, self.val(i))

    @cache
    def calibrated(self, i, name, names=VERSIONS):
        slope, intercept = self.line(i, names)
        return slope * self.raw(i, name) + intercept

    @cache
    def threshold(self, i):
        return threshold_in_use(self.calibrated(i, 'val/plain'), self.val(i))

    def rows(self, part):
        "Which test films belong to a set"
        return (
            np.ones(len(self.test), bool) if part == 'all' else (self.test.set == part).to_numpy()
        )

    def tables(self, replicates):
        "Set -> metric -> entry"
        return {
            part: table_of(self, part, replicates)
            for part in SETS[self.data]
            if self.rows(part).any()
        }


def with_sets(films, data, matches):
    "Films with `set`: common, the 66 or the 67; and `wide`"
    if data == 'chest_xray':
        matched = films.image_id.isin(matches.file[matches.mnist_split == 'test'])
        other = 'the 66'
    else:
        matched, other = films.ratio.notna(), 'the 67'
    return films.assign(
        set=np.where(matched | (films.label == 1), 'common', other), wide=films.ratio >= WIDE
    )


def networks_of(facts, logits, films, part):
    "(data set, network, recipe) -> `Network`"
    found = {}
    for entry_ in facts['jobs']:
        job = entry_['job']
        if job['part'] == part:
            found.setdefault((job['data'], job['arch'], job['name']), []).append(entry_)
    look = (
        (lambda key: key.replace('candidates', 'looks', 1))
        if part == 'candidates'
        else (lambda key: key)
    )
    seen = {
        k: [j for j in jobs if f"{look(j['key'])}/test/1" in logits] for k, jobs in found.items()
    }
    return {
        k: Network(k[0], sorted(jobs, key=lambda j: j['job']['seed']), logits, films[k[0]], look)
        for k, jobs in seen.items()
        if jobs
    }


def table_of(network, part, replicates):
    "Metric -> entry, over seeds and children; `raw_brier` and `raw_ece` without a calibrator"
    rows = network.rows(part)
    films = network.test[rows]
    y, weights = films.label.to_numpy(), child_weights(films.patient_id, replicates)
    one, few = np.ones((1, len(films))), weights[:ECE_REPLICATES]
    draws, points = {}, {}
    for i in range(len(network)):
        z, raw, threshold = (
            network.calibrated(i, 'test/1')[rows],
            network.raw(i, 'test/1')[rows],
            network.threshold(i),
        )
        for w, kept in ((one, points), (weights, draws)):
            found = metrics(z, y, w, threshold)
            found['raw_brier'] = brier(raw, y, w)
            if part == 'all':
                short = w if w is one else few
                found |= dict(ece=ece(z, films, short), raw_ece=ece(raw, films, short))
            for name, values in found.items():
                kept.setdefault(name, []).append(values)
    each = {name: np.concatenate(values) for name, values in points.items()}
    return {
        name: entry(each[name].mean(), two_way(np.stack(values)), each[name])
        for name, values in draws.items()
    }


def ensemble_of(networks, part, replicates):
    "Metric -> entry of the mean of all members' calibrated logits; members of one data set and fold"
    members = [(n, i) for n in networks for i in range(len(n))]
    first, _ = members[0]
    rows, val = first.rows(part), first.val(0)
    films = first.test[rows]
    z = np.mean([n.calibrated(i, 'test/1') for n, i in members], 0)[rows]
    threshold = threshold_in_use(
        np.mean([n.calibrated(i, 'val/plain') for n, i in members], 0), val
    )
    weights = child_weights(films.patient_id, replicates)
    y, one = films.label.to_numpy(), np.ones((1, len(films)))
    points, draws = metrics(z, y, one, threshold), metrics(z, y, weights, threshold)
    if part == 'all':
        points['ece'], draws['ece'] = ece(z, films, one), ece(z, films, weights[:ECE_REPLICATES])
    return {
        name: entry(points[name][0], draws[name]) | dict(members=len(members)) for name in points
    }


def ensembles(networks, replicates):
    "Set -> metric -> entry of all members together"
    first = networks[0]
    return {
        p: ensemble_of(networks, p, replicates) for p in SETS[first.data] if first.rows(p).any()
    }


# Goals, ladder, hypotheses


def goals(tables):  # (data, who) -> set -> metric -> entry
    "A row a goal"
    rows = []
    for (data, who), sets in tables.items():
        for part, found in sets.items():
            for name, (sign, goal) in GOALS.get((data, part), {}).items():
                e = found[name]
                rows.append(
                    dict(
                        data=data,
                        who=who,
                        set=part,
                        metric=name,
                        goal=goal,
                        met=bool(sign * (e['value'] - goal) >= 0),
                        **e,
                    )
                )
    return rows


def specificity(network, i, rows, weights, half=False):
    "Specificity among these test films"
    z = network.raw(i, 'test/1') if half else network.calibrated(i, 'test/1') - network.threshold(i)
    well = (network.test.label == 0).to_numpy() & rows
    return share((z < 0).astype(float)[well], weights[:, well])


def over_seeds(value, n, children, replicates):  # (i, weights [replicates, films]) -> [replicates]
    "The entry of the mean over `n` seeds of a value that is computed with weights of films"
    weights = child_weights(children, replicates)
    one = np.ones((1, weights.shape[1]))
    each = np.array([value(i, one)[0] for i in range(n)])
    return entry(each.mean(), two_way(np.stack([value(i, weights) for i in range(n)])), each)


def lost_on_others(network, replicates):
    "H1: specificity on the common normals less that on the 66"
    common, other = network.rows('common'), network.rows('the 66')

    def value(i, w):
        return specificity(network, i, common, w) - specificity(network, i, other, w)

    return over_seeds(value, len(network), network.test.patient_id, replicates)


def grid_difference(a, b, part, replicates):
    "H2: specificity at one half of one cell less another's, on a set"
    rows = a.rows(part)

    def value(i, w):
        return specificity(a, i, rows, w, True) - specificity(b, i, rows, w, True)

    return over_seeds(value, min(len(a), len(b)), a.test.patient_id, replicates)


def fall_when_wider(a, b, replicates):
    "H3: how much more specificity at one half `b` loses than `a` when validation normals are made wider"
    val = a.val(0)
    well = (val.label == 0).to_numpy()

    def fall(network, i, w):
        before, after = (
            (network.raw(i, f'val/{v}')[well] < 0).astype(float) for v in ('plain', 'wider')
        )
        return share(before, w[:, well]) - share(after, w[:, well])

    return over_seeds(
        lambda i, w: fall(b, i, w) - fall(a, i, w), min(len(a), len(b)), val.patient_id, replicates
    )


def guides(networks):
    "H4: rank correlation over recipes of C (sign turned) and of validation AUC with test specificity at one half"
    one = [np.ones((1, len(n.test))) for n in networks]
    got = [
        np.mean([specificity(n, i, n.rows('all'), w, True)[0] for i in range(len(n))])
        for n, w in zip(networks, one)
    ]
    mean = {
        k: [np.mean([j[k] for j in n.jobs]) for n in networks] for k in ('criterion', 'valid_auc')
    }
    if len(networks) < 3:
        return None
    return dict(
        recipes=len(networks),
        criterion=float(spearmanr(-np.array(mean['criterion']), got).statistic),
        valid_auc=float(spearmanr(mean['valid_auc'], got).statistic),
    )


def against(network, base, name, replicates):
    "H5: a metric of `network` less that of `base`, paired in seeds, at each one's threshold in use"

    def value(i, w):
        found = [
            metrics(n.calibrated(i, 'test/1'), n.test.label.to_numpy(), w, n.threshold(i))[name]
            for n in (network, base)
        ]
        return found[0] - found[1]

    return over_seeds(value, min(len(network), len(base)), network.test.patient_id, replicates)


def perturbed_against_plain(network, name, replicates):
    "H6: Brier score or calibration error of Platt on seven versions less that of Platt on plain validation"

    def one(i, w, names):
        z = network.calibrated(i, 'test/1', names)
        return (
            ece(z, network.test, w) if name == 'ece' else brier(z, network.test.label.to_numpy(), w)
        )

    count = ECE_REPLICATES if name == 'ece' else replicates
    return over_seeds(
        lambda i, w: one(i, w, VERSIONS) - one(i, w, ('plain',)),
        len(network),
        network.test.patient_id,
        count,
    )


def teachers_of(distilled, i, facts):
    "A `Network` for each teacher of a distilled network"
    jobs = [teacher['job'] for teacher in distilled.jobs[i]['job']['teachers']]
    entries = [entry for job in jobs for entry in facts['jobs'] if entry['job'] == job]
    return [Network('chest_xray', [e], distilled.logits, distilled.films) for e in entries]


def validation_auc(networks):  # A `Network` each
    "Validation AUC of the mean calibrated logit of their first trainings"
    val = networks[0].val(0)
    z = np.mean([network.calibrated(0, 'val/plain') for network in networks], 0)
    return float(auc(z, val.label.to_numpy(), np.ones((1, len(val))))[0])


def taught_alike(distilled):
    "The largest group of distilled networks that have the same teachers"
    groups = {}
    for job in distilled.jobs:
        groups.setdefault(str(job['job']['teachers']), []).append(job)
    jobs = max(groups.values(), key=len)
    return Network('chest_xray', jobs, distilled.logits, distilled.films)


def spread(network):
    "SD over seeds of specificity on the test, at the threshold in use; None for a single seed"
    every = network.rows('all'), np.ones((1, len(network.test)))
    each = [specificity(network, i, *every)[0] for i in range(len(network))]
    return float(np.std(each, ddof=1)) if len(each) > 1 else None


def distilled_against(distilled, plain, facts):
    "H7: validation AUC beside the teachers', SD of specificity beside plain seeds'"
    each = []
    for i, job in enumerate(distilled.jobs):
        teacher = validation_auc(teachers_of(distilled, i, facts))
        near = job['valid_auc'] >= teacher - NEAR
        names = ('key', 'criterion', 'valid_auc')
        each.append({name: job[name] for name in names} | dict(teacher_auc=teacher, near=near))
    alike = taught_alike(distilled)
    keys = {job['key'] for job in alike.jobs}
    below = [one['teacher_auc'] - one['valid_auc'] for one in each if one['key'] in keys]
    return dict(
        each=each,
        distillations=len(alike),
        auc_below_teachers=float(np.mean(below)),
        sd_distilled=spread(alike),
        sd_plain=spread(plain),
    )


def elsewhere(network, films, replicates):
    "H8: AUC at the other hospital, within each view"
    found = {}
    for view, rows in films.groupby('view').indices.items():
        part = films.iloc[rows]
        y = part.label.to_numpy()
        found[view] = over_seeds(
            lambda i, w, rows=rows, y=y: auc(network.raw(i, 'nih')[rows], y, w),
            len(network),
            part.patient_id,
            replicates,
        )
    return found


def in_shapes(network):
    "Shape -> mean specificity and sensitivity at the threshold in use and AUC, over seeds"
    y, one, found = network.test.label.to_numpy(), np.ones((1, len(network.test))), {}
    for f in SHAPES:
        each = [
            metrics(network.calibrated(i, f'test/{f:g}'), y, one, network.threshold(i))
            for i in range(len(network))
        ]
        found[f'{f:g}'] = {
            k: float(np.mean([e[k][0] for e in each]))
            for k in ('auc', 'sensitivity', 'specificity')
        }
    return found


def findings(folders, matches, replicates=2000):
    "Everything that the plan asks of these logits"
    facts, logits = read(*folders)
    films = {d: with_sets(films_of(facts, d), d, matches) for d in SETS}
    seeds, grid, tried, distilled = (
        networks_of(facts, logits, films, p) for p in ('seeds', 'grid', 'candidates', 'distil')
    )
    tables, found = (
        {},
        dict(seeds={f'{d} {a}': len(n) for (d, a, _), n in seeds.items()}, choice=facts['choice']),
    )
    for (data, arch, _), n in (
        seeds | {(d, f'{a} distilled', r): n for (d, a, r), n in distilled.items()}
    ).items():
        tables[data, arch] = n.tables(replicates)
        if len(n) > 1:
            tables[data, f'{arch}, ensemble'] = ensembles([n], replicates)
    for data in SETS:
        several = [n for (d, _, _), n in seeds.items() if d == data]
        if len(several) > 1:
            tables[data, 'all networks, ensemble'] = ensembles(several, replicates)
    found['tables'] = {f'{d}: {who}': sets for (d, who), sets in tables.items()}
    found['goals'] = goals(tables)
    found['ladder'] = {f'{d}: {r}': n.tables(replicates) for (d, _, r), n in tried.items()}
    found['grid'] = {r: n.tables(replicates) for (_, _, r), n in grid.items()}
    found['shapes'] = {f'{d}: {a}': in_shapes(n) for (d, a, _), n in seeds.items()}
    found['hypotheses'] = hypotheses(facts, seeds, grid, tried, distilled, replicates)
    return found


def hypotheses(facts, seeds, grid, tried, distilled, replicates):
    "H1 to H8, where the trainings that they need are there"
    chest = {a: n for (d, a, _), n in seeds.items() if d == 'chest_xray'}
    cells, ladder = (
        {r: n for (_, _, r), n in grid.items()},
        {r: n for (d, _, r), n in tried.items() if d == 'chest_xray'},
    )
    found = dict(H1={a: lost_on_others(n, replicates) for a, n in chest.items()})
    if {'squash_stretch', 'letterbox_equalise'} <= set(cells):
        pair = cells['squash_stretch'], cells['letterbox_equalise']
        found['H2'] = {
            part: grid_difference(*pair, part, replicates) for part in ('common', 'the 66')
        }
    if {'squash_stretch', 'squash_equalise'} <= set(cells):
        found['H3'] = fall_when_wider(cells['squash_stretch'], cells['squash_equalise'], replicates)
    found['H4'] = dict(grid=guides(list(cells.values())), candidates=guides(list(ladder.values())))
    chosen = facts['choice'].get('chest_xray', {}).get('chosen')
    if chosen != 'stretch' and {'stretch', chosen} <= set(ladder):
        found['H5'] = {
            m: against(ladder[chosen], ladder['stretch'], m, replicates)
            for m in ('specificity', 'auc')
        }
    found['H6'] = {
        f'{d} {a}': {m: perturbed_against_plain(n, m, replicates) for m in ('brier', 'ece')}
        for (d, a, _), n in seeds.items()
    }
    plain = next((n for a, n in chest.items() if 'efficientnet' not in a), None)
    if distilled and plain:
        found['H7'] = distilled_against(next(iter(distilled.values())), plain, facts)
    nih = films_of(facts, 'nih_chestxray14')
    found['H8'] = {f'{d} {a}': elsewhere(n, nih, replicates) for (d, a, _), n in seeds.items()}
    return found


# Pages


def quoted(e):
    if e is None or e['value'] is None or not np.isfinite(e['value']):
        return ''
    return f"{e['value']:.3f} ({e['lower']:.3f} to {e['upper']:.3f})"


def markdown(found):
    "Goals, tables and ladder for people"
    chosen = {data: choice['chosen'] for data, choice in found['choice'].items()}
    lines = ["# Findings", "", f"Trainings: {found['seeds']}", f"Chosen: {chosen}", ""]
    lines += [
        "| set | who | metric | goal | value (interval) | SD over seeds | met |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in found['goals']:
        spread = f"{r['sd']:.3f}" if r.get('sd') is not None else ''
        met = 'yes' if r['met'] else 'no'
        cells = f"{r['data']}: {r['set']}", r['who'], r['metric'], r['goal'], quoted(r), spread, met
        lines.append(f"| {' | '.join(map(str, cells))} |")
    names = (
        'auc',
        'accuracy',
        'sensitivity',
        'specificity',
        'specificity_half',
        'brier',
        'raw_brier',
        'ece',
        'raw_ece',
    )
    for title in ('tables', 'ladder', 'grid'):
        lines += [
            "",
            f"## {title}",
            "",
            "| who | set | " + " | ".join(names) + " |",
            "|---|---|" + "---|" * len(names),
        ]
        for who, sets in found[title].items():
            lines += [
                f"| {who} | {part} | " + " | ".join(quoted(t.get(n)) for n in names) + " |"
                for part, t in sets.items()
            ]
    return "\n".join(
        [
            *lines,
            "",
            "## Hypotheses",
            "",
            "```",
            json.dumps(found['hypotheses'], indent=1),
            "```",
            "",
        ]
    )


def plain(x):
    "`x` with None for numbers that are not finite"
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    return None if isinstance(x, float) and not np.isfinite(x) else x


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('folders', type=Path, nargs='+')
    parser.add_argument('--matches', type=Path, required=True)
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--replicates', type=int, default=2000)
    options = parser.parse_args(arguments)
    matches = pd.read_csv(options.matches, keep_default_na=False)
    found = plain(findings(options.folders, matches, options.replicates))
    with atomic_write(options.out / 'findings.json') as f:
        f.write_text(to_json(found, indent=1) + "\n")
    with atomic_write(options.out / 'findings.md') as f:
        f.write_text(markdown(found))
    print(f"{options.out / 'findings.md'}")


if __name__ == '__main__':
    main()
