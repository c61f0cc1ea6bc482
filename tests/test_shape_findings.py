"Figures of shape: drawn from committed logits again, and on small cases with a known answer"

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'benchmarks'))
import covered_films
import shape_findings
from covered_films import BORDER, CHANGES, CORNER, LUNGS, changed, exact_lungs, lung_boxes
from more_seeds import missing_seeds
from second_edition import grid_jobs, seed_jobs
from second_edition_films import fitted
from shape_findings import EDITION, best_cut, entries, measure
from shape_grid import check_films, missing_jobs

from cxr_study.core.run import StudyError
from cxr_study.data.images import resize
from cxr_study.data.phantom import draw_phantom, phantom_table

BEFORE_THE_OTHERS = ('chest_xray', 'resnet18', 8)  # Trained one seed more


@pytest.fixture(scope='module')
def committed():
    return json.loads((EDITION / 'shape.json').read_text())


def test_every_figure_follows_from_the_committed_logits(committed):
    again = shape_findings.findings(replicates=20)
    assert again['seeds'] == committed['seeds'] and again['figures'].keys() == (
        committed['figures'].keys()
    )
    for name, entry in again['figures'].items():
        assert entry['value'] == pytest.approx(committed['figures'][name]['value'], abs=1e-9), name
    regions = dict(lungs=[list(box) for box in LUNGS], border=BORDER, corner=CORNER)
    assert committed['regions'] == regions


def test_intervals_hold_their_values_and_follow_again(committed):
    for name, entry in committed['figures'].items():
        if entry['lower'] is not None:
            assert entry['lower'] - 1e-12 <= entry['value'] <= entry['upper'] + 1e-12, name
    facts, _, films = shape_findings.read_calls(EDITION)
    again = shape_findings.ratio_figures(films['chest_xray'], 2000)
    for name, entry in again.items():
        assert entry == pytest.approx(committed['figures'][name], abs=1e-9), name


def simulated(n=400, seed=0):
    rng = np.random.default_rng(seed)
    label = np.arange(n) % 2
    films = pd.DataFrame(dict(label=label, patient_id=[f'p{i // 4}' for i in range(n)]))
    return films, rng.normal(label)


def test_metrics_are_those_of_scikit_learn():
    from sklearn.metrics import recall_score, roc_auc_score

    films, z = simulated()
    found = entries([measure(z, films, 0.5)], films, 50)
    called = z >= 0.5
    assert found['auc']['value'] == pytest.approx(roc_auc_score(films.label, z))
    assert found['sensitivity']['value'] == pytest.approx(recall_score(films.label, called))
    assert found['specificity']['value'] == pytest.approx(
        recall_score(films.label, called, pos_label=0)
    )
    normals = films[films.label == 0].reset_index(drop=True)
    only = entries([measure(z[films.label == 0], normals, 9)], normals, 50)
    assert set(only) == {'specificity'} and only['specificity']['value'] == 1
    assert 0.9 < only['specificity']['lower'] < 1 and only['specificity']['upper'] == 1


def test_best_cut_separates_what_can_be_separated():
    assert best_cut(np.array([1.0, 1.1, 1.2, 1.5, 1.6]), np.array([0, 0, 0, 1, 1])) == 1.5


@pytest.mark.parametrize('side', (64, 97, 224))
def test_regions_cover_what_they_say(side):
    rng = np.random.default_rng(0)
    films = rng.integers(1, 255, (2, side, side)).astype(np.uint8)
    for change in CHANGES[1:5]:
        covered = changed(films, change)
        for film, result in zip(films, covered):
            touched = film != result
            assert len(np.unique(result[touched])) == 1
            assert abs(result[touched][0] - film[~touched].mean()) < 2
    boxes = lung_boxes(side)
    centre, left = (changed(films, name)[0] for name in ('centre covered', 'only centre'))
    assert (centre[~boxes] == films[0][~boxes]).all() and (left[boxes] == films[0][boxes]).all()
    assert not (boxes & covered_films.border(side)).any()
    assert not (boxes & covered_films.corners(side)).any()


def test_covered_pixels_leave_no_trace():
    "Another film that differs in the covered pixels alone gives the same covered film"
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 256, (2, 64, 64)).astype(np.uint8)
    mask = lung_boxes(64)
    other = np.where(mask, other, one)
    assert (covered_films.cover(one, mask) == covered_films.cover(other, mask)).all()


def test_marks_are_small_and_the_same_in_every_call():
    films = np.full((6, 224, 224), 90, np.uint8)
    for change in CHANGES[5:]:
        marked = changed(films, change)
        assert 0 < (marked != films).mean() < 0.02
        assert (marked == changed(films, change)).all()


def test_lungs_of_a_phantom_are_where_it_is_dark():
    for row in list(phantom_table(12).itertuples())[:6]:
        image, opacity = draw_phantom(row, 0, 64)
        lungs = exact_lungs(row, 64)
        assert 0.1 < lungs.mean() < 0.5
        assert image[lungs & ~opacity].mean() < image[~lungs][image[~lungs] > 20].mean()
        assert not (opacity & ~lungs).any()


def test_missing_trainings_keep_the_order_of_the_plan():
    done = {job.key for job in grid_jobs() if job.seed < 2 or job.name.startswith('squash')}
    missing = missing_jobs(done - {grid_jobs()[0].key})
    assert missing[0] == grid_jobs()[0]
    assert [job.seed for job in missing[1:]] == [2] * 4 + [3] * 4 + [4] * 4


def test_more_seeds_bring_every_network_to_the_same_number():
    chosen = dict(chest_xray='wide', pneumoniamnist='wide')
    trained = [job for job in seed_jobs(chosen) if job.seed < 8]
    trained += [j for j in seed_jobs(chosen) if (j.data, j.arch, j.seed) == BEFORE_THE_OTHERS]
    missing = missing_seeds(trained, chosen, most=10)
    assert not set(missing) & set(trained)
    networks = Counter((job.data, job.arch) for job in [*trained, *missing])
    assert set(networks.values()) == {10} and len(networks) == 4
    assert [job.seed for job in missing] == [8, 8, 8, 9, 9, 9, 9]
    assert (missing[-1].data, missing[-1].arch) == BEFORE_THE_OTHERS[:2]


def test_other_films_are_refused():
    table = pd.DataFrame(dict(image_id=['a'], row=[0], label=[1]))
    check_films(table, dict(chest_xray=dict(image_id=['a'], label=[1])))
    with pytest.raises(StudyError, match='label'):
        check_films(table, dict(chest_xray=dict(image_id=['a'], label=[0])))


@pytest.mark.parametrize('geometry', ('crop', 'letterbox'))
def test_the_grid_sees_what_the_study_sees_of_the_whole_film(geometry):
    "A film squashed and then given its shape again is close to `resize` of the film itself"
    y, x = np.mgrid[:300, :450]
    film = (127 + 60 * np.sin(x / 40) + 60 * np.cos(y / 30)).astype(np.uint8)
    squashed = np.asarray(Image.fromarray(film).resize((224, 224), Image.BILINEAR))
    difference = fitted(squashed, 1.5, 64, geometry).astype(int) - resize(film, 64, geometry)
    assert abs(difference).mean() < 2
