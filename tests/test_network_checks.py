"What the results pages show of the shipped network belongs to its published run"

import shutil

import network_checks
import numpy as np
import pandas as pd
import pytest

from cxr_study.core.run import Run, root
from cxr_study.robust.corruptions import calibration_of, read_calibration, read_logits

RESULTS = root() / 'results'
RUN = Run(network_checks.EDITION / network_checks.NETWORK / 'seed0')
TOLERANCE = 0.02  # Of a logit: another machine, another runtime, and half precision in the file


@pytest.fixture(scope='module')
def predictions():
    return RUN.read('predictions.csv').set_index('image_id')


@pytest.mark.parametrize('name', ['second_edition', 'stress-second_edition'])
def test_sweeps_are_of_validation_films_and_of_this_network(name, predictions):
    table, logits = read_logits(RESULTS / f'robustness/{name}.npz')
    published = predictions.loc[table.image_id]
    assert (published.split == 'val').all() and (published.label == table.label.to_numpy()).all()
    np.testing.assert_allclose(logits['clean'], published.logit, atol=TOLERANCE)
    calibration = read_calibration(RESULTS / f'robustness/{name}.npz')
    assert calibration.calibrator == calibration_of(RUN).calibrator


def test_maps_are_of_validation_films_called_pneumonia(predictions):
    with np.load(RESULTS / 'explanation/maps.npz') as stored:
        published = predictions.loc[stored['image_id']]
    assert (published.split == 'val').all()
    assert calibration_of(RUN).decide(published.logit).all()


def test_the_familiarity_check_refuses_one_in_a_hundred_of_validation(predictions):
    scores = pd.read_csv(RESULTS / 'external/second_edition-familiarity.csv')
    own = scores[scores.split != 'nih'].set_index('image_id')
    assert own.split.equals(predictions.split.loc[own.index])
    assert (own.score[own.split == 'val'] > 1).mean() == pytest.approx(0.01, abs=0.002)
    other = RUN.read('external-nih_chestxray14.csv')
    assert set(scores.image_id[scores.split == 'nih']) == set(other.image_id)


def test_shapes_follow_from_the_committed_logits(tmp_path, monkeypatch):
    stored = RESULTS / 'robustness/shapes.csv'
    (tmp_path / 'robustness').mkdir()
    again = shutil.copy(stored, tmp_path / 'robustness')
    monkeypatch.setattr(network_checks, 'RESULTS', tmp_path)
    network_checks.write_shapes(RUN)
    pd.testing.assert_frame_equal(pd.read_csv(again), pd.read_csv(stored))
    figures = stored.with_suffix('.json').read_text()
    assert (tmp_path / 'robustness/shapes.json').read_text() == figures
