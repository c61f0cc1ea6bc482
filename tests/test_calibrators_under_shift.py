"Calibrators and the ladder of the second edition: hand-made cases, and the committed figures computed again"

import json

import calibrators
import ladder
import numpy as np
import pytest
from second_edition_findings import brier
from sklearn.isotonic import IsotonicRegression

EDITION = calibrators.EDITION


def test_venn_abers_of_four_films():
    films, labels = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0, 0, 1, 1])
    found = calibrators.venn_abers(films, labels, np.array([0.0, 2.0, 2.5, 5.0, 2.5]))
    assert found == pytest.approx([1 / 4, 1 / 3, 1 / 2, 3 / 4, 1 / 2])


def test_venn_abers_is_isotonic_regression_with_the_film_in_both_classes():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60)
    films = np.round(rng.normal(labels, 1), 1)  # With ties
    new = np.round(rng.normal(0.5, 2, 40), 1)
    expected = []
    for logit in new:
        p0, p1 = (
            IsotonicRegression()
            .fit(np.append(films, logit), np.append(labels, y))
            .predict([logit])[0]
            for y in (0, 1)
        )
        expected.append(p1 / (1 - p0 + p1))
    assert calibrators.venn_abers(films, labels, new) == pytest.approx(expected)
    shift = rng.permutation(60)
    again = calibrators.venn_abers(films[shift], labels[shift], new)
    assert again == pytest.approx(expected)


def test_a_calibration_error_of_four_films():
    "Two bins: the mean probability 0.8 against one half, and 0.2 against none"
    p = np.array([0.8, 0.81, 0.2, 0.2])
    found = calibrators.ece_15(np.log(p / (1 - p)), np.array([1, 0, 0, 0]))
    assert found == pytest.approx((1.61 - 1 + 0.4) / 4)


def test_the_committed_calibrators_follow_from_the_committed_logits():
    figures = json.loads((EDITION / 'calibrators.json').read_text())['figures']
    name = 'pneumoniamnist-resnet18'
    network = calibrators.networks(EDITION)[name]
    logits = [calibrators.fitted_logits(network, i, 'test/1') for i in range(len(network))]
    assert set(logits[0]) == set(calibrators.WAYS)
    for part in ('all', 'common'):
        films, _, rows = calibrators.rows_of(network, part)
        chosen = {way: [z[way][rows] for z in logits] for way in calibrators.WAYS}
        again = calibrators.entries_of(calibrators.measured(chosen, films, replicates=2))
        for entry, found in again.items():
            committed = figures[f'{name}.{part}.{entry}']['value']
            assert found['value'] == pytest.approx(committed, abs=1e-9), entry
    mean = np.mean([z['isotonic.seven'] for z in logits], 0)
    y, one = network.test.label.to_numpy(), np.ones((1, len(mean)))
    ensemble = figures[f'{name}.ensemble.all.isotonic.seven.brier']['value']
    assert brier(mean, y, one)[0] == pytest.approx(ensemble, abs=1e-9)


def test_the_shipped_calibrator_is_the_one_of_the_findings():
    figures = json.loads((EDITION / 'calibrators.json').read_text())['figures']
    findings = json.loads((EDITION / 'findings.json').read_text())
    for name in ('chest_xray-resnet18', 'pneumoniamnist-tf_efficientnetv2_b0'):
        data, _, arch = name.partition('-')
        table = findings['tables'][f'{data}: {arch}']['all']
        together = findings['tables'][f'{data}: {arch}, ensemble']['all']
        for metric in ('brier', 'ece'):
            for field in ('value', 'lower', 'upper'):
                found = figures[f'{name}.all.platt.seven.{metric}'][field]
                assert found == pytest.approx(table[metric][field], abs=1e-9)
                found = figures[f'{name}.ensemble.all.platt.seven.{metric}'][field]
                assert found == pytest.approx(together[metric][field], abs=1e-9)
            raw = figures[f'{name}.all.raw.{metric}']['value']
            assert raw == pytest.approx(table[f'raw_{metric}']['value'], abs=1e-9)


def test_the_committed_ladder_follows_from_the_committed_logits(tmp_path):
    ladder.main(['--out', str(tmp_path), '--replicates', '2'])
    committed, again = (
        json.loads((folder / 'ladder.json').read_text())['figures']
        for folder in (EDITION, tmp_path)
    )
    assert again.keys() == committed.keys()
    for name, entry in again.items():
        assert entry['value'] == pytest.approx(committed[name]['value'], abs=1e-9), name
    choice = json.loads((EDITION / 'findings.json').read_text())['choice']
    for data, found in choice.items():
        for row in found['table']:
            for metric in ('criterion', 'wide_specificity', 'valid_auc', 'excess'):
                value = committed[f"{data}.{row['candidate']}.{metric}"]['value']
                assert value == pytest.approx(row[metric], abs=1e-9), (row['candidate'], metric)
