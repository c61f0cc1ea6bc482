"The second edition's script: its rule on numbers with a known answer, its draws, a whole run with tiny networks"

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'benchmarks'))
from second_edition import candidates, seed_jobs
from second_edition_films import SHAPES, VERSIONS, fitted, independent, marked
from second_edition_rule import choose, criterion, platt_line, standard_error, wide_specificity
from second_edition_tables import write_tables

from cxr_study.predict.table import read_predictions


def drawn(n=400, seed=0):
    "Films whose label depends on the shape, with a logit that knows only the label"
    rng = np.random.default_rng(seed)
    label = rng.random(n) < 0.7
    table = pd.DataFrame(
        dict(
            label=label.astype(int),
            wide=rng.random(n) < np.where(label, 0.8, 0.2),
            patient_id=[f"p{i // 2}" for i in range(n)],
        )
    )
    return table, rng.normal(np.where(label, 1.5, -1.5))


def test_criterion_sees_a_network_that_calls_wide_films_sick():
    table, z = drawn()
    honest = criterion(dict(plain=z), table).mean()
    by_shape = criterion(dict(plain=z + 2 * table.wide), table).mean()
    assert by_shape > honest + 0.02
    assert criterion(dict(plain=3 * z + 1), table).mean() == pytest.approx(
        honest, abs=1e-4
    )  # An affine change is the calibrator's affair
    assert (
        criterion(dict(plain=z, narrower=-z), table).mean() > 0.69
    )  # A version that turns the ranking round


def test_wide_specificity_is_read_at_the_sensitivity_of_the_plan():
    table = pd.DataFrame(dict(label=[1] * 100 + [0] * 10, wide=[True] * 110))
    z = np.r_[np.arange(100.0), np.full(4, 2.5), np.full(6, 3.5)]
    assert wide_specificity(z, table) == pytest.approx(
        0.4
    )  # 97 of 100 reach 3; four normals lie below


def test_choice_prefers_the_lowest_then_wide_normals_then_the_simplest():
    children, rng = np.arange(300), np.random.default_rng(0)
    noise = [rng.normal(0, 0.3, 300) for _ in range(3)]

    def entry(fold, mean, spread, wide):
        return dict(
            parts=mean + noise[fold] + spread * rng.normal(0, 1, 300),
            children=children,
            wide_specificity=wide,
            valid_auc=0.9,
        )

    def all_of(**cells):
        return {(n, f): entry(f, *c) for n, c in cells.items() for f in range(3)}

    names = ['a', 'b', 'c']
    assert (
        choose(all_of(a=(0.5, 0, 0.9), b=(0.3, 0, 0.5), c=(0.4, 0, 0.9)), names)[0] == 'b'
    )  # Clearly lowest
    assert (
        choose(all_of(a=(0.31, 0.5, 0.8), b=(0.3, 0.5, 0.5), c=(0.31, 0.5, 0.7)), names)[0] == 'a'
    )  # All tie: wide normals decide
    chosen, table = choose(
        all_of(a=(0.31, 0.5, 0.895), b=(0.3, 0.5, 0.9), c=(0.9, 0.5, 1.0)), names
    )
    assert chosen == 'a' and [r['tie'] for r in table] == [
        True,
        True,
        False,
    ]  # Within 0.01: the simpler; c is no tie
    assert (
        choose(all_of(a=(0.3, 0, np.nan), b=(0.3, 0, np.nan)), ['a', 'b'])[0] == 'a'
    )  # No wide normals at hand
    found = all_of(a=(0.3, 0, 0.5), b=(0.3, 0, 0.9), c=(0.2, 0, 0.5))
    del found['c', 2]
    assert choose(found, names)[1][0]['folds'] == [0, 1]  # Only folds that all finished


def test_standard_error_knows_children_with_many_films():
    rng = np.random.default_rng(0)
    each = rng.normal(0, 1, 100)
    alone = standard_error([np.repeat(each, 4)], [np.arange(400)])
    together = standard_error([np.repeat(each, 4)], [np.repeat(np.arange(100), 4)])
    assert together == pytest.approx(2 * alone, rel=1e-6)


def test_balanced_draws_make_label_and_shape_independent():
    table = drawn(3000)[0]
    at = independent(table, 3, seed=0)
    seen = table.iloc[at]
    assert (
        abs(len(at) - 3 * len(table)) <= 4 and abs(seen.label.mean() - table.label.mean()) < 0.005
    )
    assert (
        abs(np.corrcoef(seen.label, seen.wide)[0, 1])
        < 0.01
        < 0.5
        < np.corrcoef(table.label, table.wide)[0, 1]
    )
    assert not np.array_equal(at, independent(table, 3, seed=1))


def test_crops_and_letterboxes_of_a_squashed_film():
    film = np.zeros((224, 224), np.uint8)
    film[:, 56:168] = 200  # The middle half of a film twice as wide as high
    assert (fitted(film, 2.0, 64, 'crop')[:, 1:-1] == 200).all() and (
        fitted(film, 1.0, 64, 'crop') == 0
    ).any()
    boxed = fitted(np.full((224, 224), 200, np.uint8), 2.0, 64, 'letterbox')
    assert (boxed[16:48] == 200).all() and not boxed[:16].any() and not boxed[48:].any()


def test_markers_change_little_of_a_film():
    film = np.full((128, 128), 90, np.uint8)
    changed = [(marked(film, np.random.default_rng(i)) != film).mean() for i in range(20)]
    assert 0 < max(changed) < 0.05 and np.mean(np.array(changed) > 0) > 0.8


def test_seeds_are_interleaved():
    jobs = seed_jobs(dict(chest_xray='wide_crop', pneumoniamnist='wide'))
    assert [j.seed for j in jobs[:8]] == [0] * 4 + [1] * 4 and len(
        {(j.data, j.arch) for j in jobs[:4]}
    ) == 4
    assert all(j.geometry == 'crop' and j.size == 224 for j in jobs if j.data == 'chest_xray')
    assert {j.lr for j in jobs if 'efficientnet' in j.arch} == {0.003}
    assert len(candidates('chest_xray')) == 7


ARGUMENTS = ['--limit', '120', '--tiny', '--processes', '0']


def start(out, data):
    environment = dict(os.environ, CXR_DATA=str(data), OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT))
    return subprocess.Popen(
        [sys.executable, ROOT / 'benchmarks/second_edition.py', '--out', out, *ARGUMENTS],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.fixture(scope='module')
def returned(tmp_path_factory, data):
    out = tmp_path_factory.mktemp('returned')
    process = start(out, data)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    return out


def test_a_whole_run_trains_chooses_looks_and_distils(returned):
    facts = json.loads((returned / 'second_edition.json').read_text())
    assert not facts['failed'] and {j['job']['part'] for j in facts['jobs']} == {
        'candidates',
        'grid',
        'looks',
        'seeds',
        'distil',
    }
    assert all(facts['choice'][d]['by_rule'] for d in ('chest_xray', 'pneumoniamnist'))
    order = [j['job']['part'] for j in facts['jobs']]
    assert order.index('looks') > max(
        i for i, p in enumerate(order) if p == 'candidates'
    )  # The test waits for the choice
    with np.load(returned / 'seeds.npz') as z:
        names = {k.split('/', 1)[1] for k in z}
    assert names == {f'val/{v}' for v in VERSIONS} | {f'test/{f:g}' for f in SHAPES} | {'nih'}
    files = list(returned.iterdir())
    assert len(files) <= 8 and max(f.stat().st_size for f in files) < 2**24


def test_tables_hold_the_logits_of_their_films(returned, tmp_path):
    written = write_tables([returned], tmp_path)
    facts = json.loads((returned / 'second_edition.json').read_text())
    assert len(written) == sum(j['job']['part'] != 'looks' for j in facts['jobs'])
    entry = next(
        j for j in facts['jobs'] if j['job']['part'] == 'seeds' and j['job']['data'] == 'chest_xray'
    )
    place = next(
        p
        for p in written
        if p.parts[-3] == 'seeds'
        and entry['job']['arch'] in p.parts[-2]
        and 'chest_xray' in p.parts[-2]
    )
    table, versions = (
        read_predictions(place / 'predictions.csv'),
        read_predictions(place / 'versions.csv'),
    )
    with np.load(returned / 'seeds.npz') as z:
        assert np.array_equal(
            table.logit[table.split == 'test'], z[f"{entry['key']}/test/1"].astype(float)
        )
    assert versions.groupby('version').size().nunique() == 1 and set(versions.version) == set(
        VERSIONS
    )
    z = {v: versions.logit[versions.version == v].to_numpy() for v in VERSIONS}
    assert platt_line(z, table[table.split == 'val']) == pytest.approx(
        (entry['slope'], entry['intercept']), rel=1e-3, abs=1e-3
    )


def test_what_is_finished_survives_a_kill(tmp_path, data):
    process = start(tmp_path, data)
    for line in process.stdout:
        if 'candidates-pneumoniamnist' in line:
            break
    process.kill()
    process.communicate()
    facts = json.loads((tmp_path / 'second_edition.json').read_text())
    with np.load(tmp_path / 'search.npz') as z:
        assert all(f"{j['key']}/val/plain" in z for j in facts['jobs'])
    assert len(facts['jobs']) >= 3 and not list(tmp_path.glob('.*'))
