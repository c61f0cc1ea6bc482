"What is read of the second edition's logits: statistics against known answers, and a whole folder with drawn logits"

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student
from sklearn.metrics import roc_auc_score

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'benchmarks'))
from second_edition import Job, judged
from second_edition_films import SHAPES, VERSIONS
from second_edition_findings import (
    auc,
    child_weights,
    entry,
    findings,
    markdown,
    metrics,
    plain,
    threshold_in_use,
    two_way,
)
from second_edition_tables import read

from cxr_study.core.run import StudyError, to_json


def test_weighted_auc_is_that_of_repeated_films():
    rng = np.random.default_rng(0)
    y, z = rng.integers(0, 2, 60), rng.integers(0, 12, 60).astype(float)  # With ties
    weights = rng.integers(0, 3, (5, 60)).astype(float)
    for w, found in zip(weights, auc(z, y, weights)):
        times = w.astype(int)
        assert found == pytest.approx(roc_auc_score(np.repeat(y, times), np.repeat(z, times)))


def test_metrics_at_a_threshold():
    found = metrics(np.array([-2.0, 0.5, 0.5, 3.0]), np.array([0, 0, 1, 1]), np.ones((1, 4)), 1.0)
    assert (
        found['sensitivity'][0] == 0.5
        and found['specificity'][0] == 1
        and found['accuracy_half'][0] == 0.75
    )


def test_threshold_keeps_the_sensitivity_and_weighs_wide_normals():
    z = np.r_[np.linspace(1, 10, 100), np.full(90, 0.5), np.linspace(0, 2, 10)]
    val = pd.DataFrame(
        dict(label=[1] * 100 + [0] * 100, wide=[True] * 100 + [False] * 90 + [True] * 10)
    )
    threshold = threshold_in_use(z, val)
    assert (z[:100] >= threshold).mean() >= 0.97
    assert (
        1.1 < threshold < 1.3
    )  # A threshold of 0.75 already keeps the 90; ten wide normals draw it upwards
    assert threshold_in_use(z, val.assign(wide=val.label == 1)) < threshold


def test_two_way_interval_covers_where_students_t_does_not():
    rng, hits, narrow = np.random.default_rng(0), 0, 0
    for trial in range(200):
        child, seeds = rng.normal(0, 1, 100), rng.normal(0, 0.02, 5)
        values = 1 + child + seeds[:, None] + rng.normal(0, 0.1, (5, 100))  # [seeds, films]
        weights = child_weights(np.arange(100), 400, seed=trial)
        draws = np.stack([weights @ v / weights.sum(1) for v in values])
        found, each = entry(values.mean(), two_way(draws, trial), values.mean(1)), values.mean(1)
        half = student.ppf(0.975, 4) * each.std(ddof=1) / 5**0.5
        hits += found['lower'] <= 1 <= found['upper']
        narrow += abs(each.mean() - 1) <= half
    assert 0.9 <= hits / 200 <= 0.98 and narrow / 200 < 0.5


def returned(folder, lost=2.0):
    "A folder as second_edition.py leaves it: 300 films a set; logits of one kind of normals are higher by `lost`"
    rng, facts, logits = (
        np.random.default_rng(0),
        dict(jobs=[], failed=[], films={}, choice={}),
        dict(seeds={}, search={}),
    )
    matches = []
    for data in ('chest_xray', 'pneumoniamnist'):
        n = 300
        films = pd.DataFrame(
            dict(
                image_id=[f'{data}/{i}' for i in range(n)],
                patient_id=[f'p{i // 2}' for i in range(n)],
                official='',
                label=np.arange(n) // 2 % 2,
            )
        )
        films['fold'] = np.where(np.arange(n) < 150, 0, np.where(np.arange(n) < 170, -1, -2))
        films['ratio'] = rng.uniform(1, 1.8, n)
        films['other'] = (films.fold == -2) & (films.label == 0) & (rng.random(n) < 0.5)
        if data == 'pneumoniamnist':
            films.loc[films.other, 'ratio'] = np.nan
        else:
            matches = pd.DataFrame(
                dict(
                    file=films.image_id,
                    mnist_split=np.where(films.other | (films.fold != -2), '', 'test'),
                )
            )
        facts['films'][data] = plain(
            films.assign(wide=films.ratio >= 1.35).drop(columns='other').to_dict('list')
        )
        facts['choice'][data] = dict(chosen='wide', by_rule=True, table=[])
        cells = (
            ('squash_stretch', 'squash_equalise', 'letterbox_equalise')
            if data == 'chest_xray'
            else ()
        )
        jobs = [
            Job('seeds', data, 'wide', s, arch=a)
            for s in range(3)
            for a in ('resnet18', 'tf_efficientnetv2_b0')
        ]
        jobs += [Job('candidates', data, name, 0) for name in ('stretch', 'wide', 'wide_crop')] + [
            Job('grid', data, c, s) for c in cells for s in range(2)
        ]
        if data == 'chest_xray':
            taught = dict(teachers=tuple(dict(job=vars(job)) for job in jobs[:6]))
            jobs += [Job('distil', data, 'wide', s, **taught) for s in range(2)]
            jobs.append(Job('distil', data, 'wide', 2, teachers=(dict(job=vars(jobs[0])),)))
        for job in jobs:
            place = logits['search' if job.part in ('candidates', 'grid') else 'seeds']

            def drawn(part, wider=0):
                z = (
                    rng.normal(0, 1, len(part))
                    + 4 * part.label
                    - 2
                    + lost * part.other
                    + wider * (1 - part.label)
                )
                return z.to_numpy(np.float32)

            val, test = films[films.fold == 0], films[films.fold == -2]
            hurt = 3 if job.name.endswith('equalise') else 0
            z = {v: drawn(val, hurt * (v == 'wider')) for v in VERSIONS}
            place |= {f'{job.key}/val/{v}': x for v, x in z.items()}
            looked = job.key.replace('candidates', 'looks', 1)
            for s in SHAPES if job.part in ('seeds', 'distil') else (1.0,):
                place[f'{looked}/test/{s:g}'] = drawn(test)
            place[f'{job.key}/nih'] = rng.normal(0, 1, 40).astype(np.float32)
            told = judged(z, val.assign(wide=val.ratio >= 1.35))
            facts['jobs'].append(dict(job=vars(job), key=job.key, history={}, **told))
    views = dict(
        image_id=[f'n{i}' for i in range(40)],
        patient_id=list(range(40)),
        label=[0, 1] * 20,
        view=['AP'] * 20 + ['PA'] * 20,
    )
    facts['films']['nih_chestxray14'] = views
    for name, arrays in logits.items():
        np.savez(folder / f'{name}.npz', **arrays)
    (folder / 'second_edition.json').write_text(to_json(plain(facts)))
    return matches


def test_findings_recover_what_was_put_in(tmp_path):
    found = plain(findings([tmp_path], returned(tmp_path), replicates=300))
    told = found['hypotheses']
    for e in told['H1'].values():
        assert e['lower'] > 0.05 and e['seeds'] == 3  # Logits of the 66 are two higher
    assert (
        told['H2']['common']['lower'] <= 0 <= told['H2']['common']['upper']
    )  # Drawn alike on the test
    assert told['H3']['lower'] > 0.3  # `equalise` loses when normals are wider
    assert set(told) == {f'H{i}' for i in range(1, 9)}
    assert [one['key'][-5:] for one in told['H7']['each']] == ['seed0', 'seed1', 'seed2']
    teachers = [one['teacher_auc'] for one in told['H7']['each']]
    assert teachers[0] == teachers[1] > teachers[2]  # Six, six and one
    assert told['H7']['distillations'] == 2  # Those with the same teachers
    tables = found['tables']
    one, together = tables['chest_xray: resnet18'], tables['chest_xray: all networks, ensemble']
    assert together['common']['auc']['members'] == 6
    assert together['common']['auc']['value'] > one['common']['auc']['value']
    mnist = tables['pneumoniamnist: resnet18']
    assert mnist['the 67']['specificity']['value'] < mnist['common']['specificity']['value']
    assert {(g['data'], g['set']) for g in found['goals']} == {
        ('chest_xray', 'all'),
        ('chest_xray', 'common'),
        ('chest_xray', 'the 66'),
        ('pneumoniamnist', 'all'),
        ('pneumoniamnist', 'common'),
    }
    page = markdown(found)
    assert '| chest_xray: the 66 | resnet18 | specificity | 0.65 |' in page and json.loads(
        to_json(found)
    )


def test_findings_see_nothing_where_nothing_is(tmp_path):
    told = findings([tmp_path], returned(tmp_path, lost=0.0), replicates=300)['hypotheses']
    assert all(e['lower'] < 0.05 for e in told['H1'].values())
    assert all(e['lower'] < 0.7 for views in told['H8'].values() for e in views.values())


def test_calls_are_read_together(tmp_path):
    first, second = tmp_path / 'first', tmp_path / 'second'
    first.mkdir(), second.mkdir()
    returned(first), returned(second)
    facts = json.loads((second / 'second_edition.json').read_text())
    for entry_ in facts['jobs'][:2]:
        entry_['key'] += '0'  # Trainings that only the second call finished
    (second / 'second_edition.json').write_text(to_json(facts))
    whole, logits = read(first, second)
    assert len(whole['jobs']) == len(facts['jobs']) + 2 and len(
        {j['key'] for j in whole['jobs']}
    ) == len(whole['jobs'])
    facts['films']['chest_xray']['label'][0] = 1 - facts['films']['chest_xray']['label'][0]
    (second / 'second_edition.json').write_text(to_json(facts))
    with pytest.raises(StudyError, match="other films"):
        read(first, second)
