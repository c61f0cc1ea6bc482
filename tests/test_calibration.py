"Calibration against simulations with known truth and against independent implementations; and what cannot be fitted"

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from notebook_functions import functions_of
from scipy.stats import norm

from cxr_study.calibrate import calibrators as ca
from cxr_study.calibrate import conformal as ab
from cxr_study.calibrate import measures as me
from cxr_study.calibrate import thresholds as de
from cxr_study.calibrate import transfer as pr
from cxr_study.core.run import StudyError
from cxr_study.evaluate import intervals as iv
from cxr_study.evaluate import metrics as mt
from cxr_study.predict.decision import (
    CURVES,
    Calibration,
    OperatingPoint,
    log_odds,
    sigmoid,
)
from cxr_study.predict.table import PredictionError


def drawn(n=2000, truth=lambda x: x, seed=0, images=1, split='val'):
    """Logits whose true log odds are `truth` of them.

    Several images of a patient share the label and most of the logit."""
    rng = np.random.default_rng(seed)
    patient = np.arange(n) // images
    logit = rng.normal(2 * np.sign(rng.random(n) - 0.4), 2)[patient * images]
    if images > 1:
        logit = logit + rng.normal(size=n) * 0.3
    label = (rng.random(n)[patient] < sigmoid(truth(logit))).astype(int)
    return pd.DataFrame(
        dict(
            image_id=[f"{split}{i}" for i in range(n)],
            patient_id=[f"{split}p{p}" for p in patient],
            split=split,
            label=label,
            logit=logit,
        )
    )


# --- known truth ---


@pytest.mark.parametrize('seed', range(5))
def test_calibrators_find_the_truth(seed):
    "Temperature 2; slope 0.5 and intercept -1; beta's three numbers; four standard errors of slack"
    half = drawn(4000, lambda x: x / 2, seed)
    moved = drawn(4000, lambda x: x / 2 - 1, seed)
    temperature = ca.fit_calibrator('temperature', half).parameters['temperature']
    assert abs(temperature - 2) < 0.25
    platt = ca.fit_calibrator('platt', moved).parameters
    assert abs(platt['slope'] - 0.5) < 0.06
    assert abs(platt['intercept'] + 1) < 0.2

    def bent(x):
        return CURVES['beta'](x, 1.5, 0.5, 0.3)

    def largest_error(kind, x):
        fitted = ca.fit_calibrator(kind, table)
        return np.abs(sigmoid(fitted(x)) - sigmoid(bent(x))).max()

    table = drawn(20000, bent, seed)
    assert largest_error('beta', np.array([-4.0, -1.0, 0.0, 2.0, 5.0])) < 0.03
    assert largest_error('isotonic', np.linspace(-3, 3, 7)) < 0.08


@pytest.mark.parametrize(
    'truth, slope, intercept',
    [(lambda x: x, 1, 0), (lambda x: 0.6 * x, 0.6, 0), (lambda x: x - 1, 1, -1)],
    ids=['calibrated', 'overconfident', 'too high'],
)
def test_slope_and_intercept_lie_in_their_intervals(truth, slope, intercept, monkeypatch):
    "95 % intervals over patients; with 40 studies, fewer than 33 hits have a chance below one in a hundred"
    monkeypatch.setattr(me, 'SLOW', {})
    hits = np.zeros(2)
    for seed in range(40):
        found = me.calibration_measures(drawn(400, truth, seed, images=2), 'val', replicates=200)
        hits += [
            found['slope']['lower'] <= slope <= found['slope']['upper'],
            slope != 1 or found['intercept']['lower'] <= intercept <= found['intercept']['upper'],
        ]
    assert (hits >= 33).all(), hits


def test_the_temperature_lies_in_the_interval_of_its_inverse_slope():
    hits = 0
    for seed in range(40):
        s = mt.scored(drawn(400, lambda x: x / 2, seed, images=2))
        line = np.concatenate(
            [me.recalibration(s, w, intercept=False)[1] for w in iv.bootstrap_weights(s, 200, seed)]
        )
        low, high = np.quantile(1 / line, [0.025, 0.975])
        hits += low <= 2 <= high
    assert hits >= 33


def test_debiased_ece_is_near_zero_for_a_calibrated_score_and_right_for_others():
    def means(truth, n):
        "Mean of the plain, the debiased and the true calibration error over 60 sets"
        errors = []
        for seed in range(60):
            table = drawn(n, truth, seed)
            s = mt.scored(table)
            true = np.abs(sigmoid(truth(table.logit)) - sigmoid(table.logit)).mean()
            errors.append([me.ece(s, s.ones)[0], me.ece_debiased(s, s.ones)[0], true])
        return np.mean(errors, axis=0)

    for n in (600, 5000):
        plain, debiased, _ = means(lambda x: x, n)
        assert debiased < 0.45 * plain
    assert plain > 2 * debiased and debiased < 0.006
    for truth in (lambda x: 0.5 * x, lambda x: x - 1.5):
        _, debiased, true = means(truth, 2000)
        assert abs(debiased - true) < 0.005


def test_conformal_coverage_is_nominal_on_exchangeable_data():
    for alpha in (0.05, 0.1):
        each = []
        for seed in range(150):
            pair = [
                mt.simulate(patients=300, images=1, separation=2.5, seed=2 * seed + k)
                for k in (0, 1)
            ]
            found = ab.coverage(ab.fit_sets(pair[0], alpha), pair[1])
            each.append([found[f'coverage_{c}']['value'] for c in ('NORMAL', 'PNEUMONIA')])
        assert np.abs(np.mean(each, axis=0) - (1 - alpha)).max() < 0.01


def true_sensitivity(threshold):
    "Share of all positive images that `simulate` could draw that reach the threshold on sigmoid(2 logit)"
    return norm.cdf(1 - log_odds(threshold) / 2)


def test_the_target_sensitivity_is_missed_in_at_most_one_of_twenty_studies():
    missed = 0
    for seed in range(300):
        table = mt.simulate(patients=400, images=1, prevalence=0.5, seed=seed)
        threshold, _ = de.keep_sensitivity(table.assign(logit=2 * table.logit), 0.95)
        missed += true_sensitivity(threshold) < 0.95
    assert missed / 300 < 0.09  # 5 % and three standard errors


def test_em_finds_a_prevalence_if_only_that_differs():
    em_prevalence = functions_of('results/06_recalibration').em_prevalence
    for prevalence in (0.1, 0.3, 0.8):
        table = mt.simulate(patients=4000, images=1, prevalence=prevalence)
        logit = 2 * table.logit.to_numpy() + log_odds(0.6)
        assert abs(em_prevalence(logit, 0.6) - prevalence) < 0.03


# --- independent implementations ---


def test_fits_are_those_of_scikit_learn():
    from sklearn.isotonic import IsotonicRegression
    from sklearn.linear_model import LogisticRegression

    table = drawn(1500, lambda x: 0.7 * x + 0.5)
    plain = LogisticRegression(C=np.inf, tol=1e-8).fit(table[['logit']], table.label)
    found = ca.fit_calibrator('platt', table).parameters
    np.testing.assert_allclose(
        [found['slope'], found['intercept']], [plain.coef_[0, 0], plain.intercept_[0]], rtol=0.03
    )  # Platt's targets differ a little
    theirs = (
        IsotonicRegression(out_of_bounds='clip')
        .fit(table.logit, table.label)
        .predict(np.linspace(-9, 9, 99))
    )
    ours = (
        sigmoid(ca.fit_calibrator('isotonic', table)(np.linspace(-9, 9, 99))) * (len(table) + 2) - 1
    ) / len(table)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_measures_are_those_of_mapie_and_scikit_learn():
    mapie = pytest.importorskip('mapie.metrics.calibration')
    from sklearn.linear_model import LogisticRegression

    table = drawn(1500, lambda x: 0.7 * x + 0.5)
    s, p = mt.scored(table), sigmoid(table.logit.to_numpy())
    np.testing.assert_allclose(
        me.spiegelhalter(s)['z'],
        mapie.spiegelhalter_statistic(table.label.to_numpy(), p),
        rtol=1e-6,
    )
    upper = mapie.spiegelhalter_p_value(
        table.label.to_numpy(), p
    )  # One-sided there, two-sided here
    np.testing.assert_allclose(me.spiegelhalter(s)['p'], 2 * min(upper, 1 - upper), rtol=0.01)

    def by_hand(score, hit):
        return sum(
            abs(hit[i].sum() - score[i].sum()) for i in np.array_split(np.argsort(score), 15)
        ) / len(score)

    np.testing.assert_allclose(me.ece(s, s.ones)[0], by_hand(p, table.label.to_numpy()), atol=1e-10)
    np.testing.assert_allclose(
        me.top_label_ece(s, s.ones)[0],
        by_hand(np.maximum(p, 1 - p), (p >= 0.5) == (table.label == 1).to_numpy()),
        atol=1e-10,
    )
    plain = LogisticRegression(C=np.inf, tol=1e-10).fit(table[['logit']], table.label)
    np.testing.assert_allclose(
        me.recalibration(s, s.ones)[:, 0], [plain.intercept_[0], plain.coef_[0, 0]], rtol=1e-3
    )


def test_intercept_in_the_large_is_that_of_statsmodels():
    import statsmodels.api as sm

    table = drawn(800, lambda x: 0.7 * x + 0.5)
    theirs = (
        sm.GLM(table.label, np.ones(len(table)), family=sm.families.Binomial(), offset=table.logit)
        .fit()
        .params.iloc[0]
    )
    s = mt.scored(table)
    np.testing.assert_allclose(me.recalibration(s, s.ones, slope=False)[0, 0], theirs, rtol=1e-6)


def test_the_reliability_curve_is_isotonic_regression():
    from sklearn.isotonic import IsotonicRegression

    for table in (drawn(500), drawn(500).assign(logit=lambda t: t.logit.round())):
        s = mt.scored(table)
        np.testing.assert_allclose(
            me.corp(s, s.label),
            IsotonicRegression().fit(s.logit, s.label).predict(s.logit),
            atol=1e-12,
        )


def reference():
    """Net benefit of a fixed table by dcurves 1.1.7.

    It is stored beside the tests because dcurves needs an older pandas."""
    file = Path(__file__).parent / 'dcurves.json'
    return pd.DataFrame(json.loads(file.read_text()))


def by_dcurves(table, prevalence=None):
    dcurves = pytest.importorskip('dcurves')
    frame = pd.DataFrame(dict(y=table.label.to_numpy(), p=sigmoid(table.logit.to_numpy())))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return dcurves.dca(
            data=frame,
            outcome='y',
            modelnames=['p'],
            thresholds=list(de.THRESHOLD_PROBABILITIES),
            prevalence=prevalence,
        )


@pytest.mark.parametrize('source', ['kept', 'dcurves'])
@pytest.mark.parametrize('prevalence', [None, 0.1])
def test_decision_curves_are_those_of_dcurves(source, prevalence):
    table = drawn(400, lambda x: 0.7 * x + 0.5, seed=4)
    s = mt.scored(table)
    if source == 'kept':
        kept = reference()
        kept = kept[kept.asked.isna() if prevalence is None else kept.asked == prevalence]
    else:
        kept = by_dcurves(table, prevalence)
    for ours, name in zip(de.net_benefit(s, s.ones, prevalence=prevalence), ('p', 'all')):
        np.testing.assert_allclose(ours[0], kept[kept.model == name].net_benefit, atol=1e-10)


def test_sets_are_those_of_crepes():
    crepes = pytest.importorskip('crepes')
    val, test = drawn(300, seed=1), drawn(500, seed=2, split='test')
    sets, own = ab.fit_sets(val, 0.1), np.where(val.label == 1, -val.logit, val.logit)
    theirs = crepes.ConformalClassifier().fit(own, bins=val.label.to_numpy())
    for k, sign in ((0, 1), (1, -1)):
        kept = theirs.predict_set(
            sign * test.logit.to_numpy()[:, None],
            bins=np.full(len(test), k),
            confidence=0.9,
            smoothing=False,
        )[:, 0]
        np.testing.assert_array_equal(kept.astype(bool), sets(test.logit)[:, k])


def test_the_area_under_the_risk_coverage_curve_is_the_mean_risk():
    table = drawn(300)
    s = mt.scored(table)
    order = np.argsort(-np.abs(s.logit), kind='stable')
    wrong = ((s.logit >= 0) != s.label)[order]
    np.testing.assert_allclose(
        ab.aurc(s, s.ones)[0], [np.mean(np.cumsum(wrong) / np.arange(1, len(wrong) + 1))]
    )


# --- what cannot be fitted ---

few = drawn(400)
DEGENERATE = {
    'one class': few[few.label == 1],
    'eight with pneumonia': pd.concat([few[few.label == 0], few[few.label == 1].head(8)]),
    'ties throughout': few.assign(logit=1.0),
    'one child': few[(few.label == 0) | (few.patient_id == few.patient_id[few.label == 1].iloc[0])],
    'wrong way round': few.assign(logit=-5 * few.logit.abs() * np.where(few.label == 1, 1, -1)),
}


@pytest.mark.parametrize('name', DEGENERATE)
@pytest.mark.parametrize('kind', ['temperature', 'platt', 'beta', 'isotonic', 'auto'])
def test_what_cannot_be_fitted_is_replaced_with_a_warning_that_names_it(name, kind):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        found, _ = ca.choose_calibrator(DEGENERATE[name], kind)
    text = ' '.join(str(w.message) for w in said if issubclass(w.category, UserWarning))
    assert found.kind != kind and np.isfinite(found(np.array([-50.0, 0, 50]))).all()
    if name != 'wrong way round':
        assert found.kind == 'none'
    if not (name == 'wrong way round' and kind == 'auto'):
        assert f"calibrator {'temperature' if kind == 'auto' else kind} cannot be fitted" in text, (
            text
        )


def test_warnings_and_rules_name_the_classes_of_the_run():
    table = drawn(400)
    few_positive = pd.concat([table[table.label == 0], table[table.label == 1].head(8)])
    with pytest.warns(UserWarning, match="there are 8 of the positive class"):
        ca.fit_calibrator('platt', few_positive)
    with pytest.warns(UserWarning, match="there are 8 of opacity"):
        found, _ = pr.fit_calibration(
            few_positive, kind='platt', replicates=10, classes=('clear', 'opacity')
        )
    sentences = [point.rule for point in found.points]
    assert not any('pneumonia' in sentence for sentence in sentences)
    assert "too few images of opacity (8)" in found.point('sensitivity_0.98').rule
    assert "a missed opacity outweighs 9 false alarms" in found.point('net_benefit').rule


def test_operating_points_need_both_classes_and_say_so():
    with pytest.raises(StudyError, match="both classes"):
        pr.fit_calibration(DEGENERATE['one class'], replicates=10)


@pytest.mark.parametrize(
    'wrong, says',
    [
        (dict(kind='plat'), "^calibrator='plat' is none of auto, none"),
        (dict(in_use='best'), "^operating_point='best' is none of half"),
        (dict(alpha=0.0), "^conformal_alpha=0"),
        (dict(cost=-1.0), "^cost_of_miss=-1"),
        (dict(replicates=0), "^promise_replicates=0"),
    ],
)
def test_wrong_parameters_name_the_choices(wrong, says):
    with pytest.raises(StudyError, match=says):
        pr.fit_calibration(few, **dict(replicates=10) | wrong)


@pytest.mark.parametrize(
    'rows',
    [
        lambda t: t[t.label == 1],
        lambda t: t[t.label == 0],
        lambda t: t.head(2),
        lambda t: t.assign(logit=0.0),
    ],
    ids=['positive', 'negative', 'two', 'ties'],
)
def test_a_test_split_of_any_kind_gives_comparisons_figures_and_strict_json(rows):
    val, test = drawn(300, seed=1), rows(drawn(100, seed=2, split='test'))
    calibration, _ = pr.fit_calibration(val, replicates=20)
    found = pr.validation_to_test(calibration, pd.concat([val, test]), replicates=20)
    json.dumps(
        [found, me.calibration_measures(test, replicates=20)], allow_nan=False, default=float
    )
    for figure in (
        pr.validation_to_test_figure([found]),
        de.decision_figure(dict(test=test)),
        me.reliability_figure(dict(test=test)),
    ):
        figure.draw_without_rendering()


@pytest.mark.parametrize('n', [10, 29, 34, 100])
def test_a_value_of_one_is_reproduced_by_one(n):
    "The upper bound of a proportion of 1 is 1 but for rounding"
    val, test = drawn(2 * n, seed=1), drawn(2 * n, seed=2, split='test')
    table = pd.concat([val, test]).assign(label=lambda t: np.tile([0, 1], 2 * n))
    table['logit'] = 20.0 * table.label - 10
    point = OperatingPoint('half', 0.5, '')
    entries = de.point_metrics(table, point, 'val', replicates=20)
    calibration = Calibration(points=(OperatingPoint('half', 0.5, '', promised=entries),))
    rows = pr._compare_points(calibration, table, replicates=20)
    assert [row['got']['value'] for row in rows] == [1, 1, 1]
    assert [row['kept'] for row in rows] == [True, True, True]


@pytest.mark.parametrize('kind', list(CURVES))
def test_no_probability_is_exactly_0_or_1_and_the_ranking_stays(kind):
    calibration = Calibration(ca.fit_calibrator(kind, drawn(600, lambda x: 3 * x)))
    x = np.r_[-1e6, -700, np.sort(np.random.default_rng(0).normal(0, 5, 500)), 700, 1e6]
    p = calibration.probability(x)
    assert (
        (p > 0).all()
        and (p < 1).all()
        and np.isfinite(np.log(p)).all()
        and np.isfinite(np.log1p(-p)).all()
    )
    assert (np.diff(calibration.logit(x)) > 0).all()


@pytest.mark.parametrize('kind', list(CURVES))
def test_a_calibration_is_the_same_after_a_round_trip(kind):
    table = drawn(600, lambda x: 0.7 * x + 0.5)
    found, _ = pr.fit_calibration(table, kind=kind, replicates=20)
    again = Calibration.from_dict(json.loads(json.dumps(found.to_dict())))
    x = np.linspace(-12, 12, 101)
    np.testing.assert_array_equal(found.probability(x), again.probability(x))
    np.testing.assert_array_equal(found.decide(x), again.decide(x))
    np.testing.assert_array_equal(found.verdict(x), again.verdict(x))
    assert again.point().name == 'sensitivity_0.98'


@pytest.mark.parametrize(
    'calibrator',
    [
        dict(kind='platt', parameters=dict(slope=-1.0, intercept=0.0)),
        dict(kind='platt', parameters=dict(slope=1.0)),
        dict(kind='magic'),
        dict(kind='temperature', parameters=dict(temperature=float('nan'))),
        dict(kind='isotonic', parameters=dict(logits=[0, 1], probabilities=[0.9, 0.1])),
    ],
)
def test_a_calibration_that_cannot_be_applied_is_refused(calibrator):
    with pytest.raises(PredictionError):
        Calibration.from_dict(
            Calibration(points=(OperatingPoint('half', 0.5, ''),)).to_dict()
            | dict(calibrator=calibrator)
        )


def test_little_data_gives_sets_that_never_exclude():
    sets = ab.fit_sets(drawn(12))
    assert sets.highest_normal is None and sets([-9.0, 9.0]).all()


def test_applying_needs_numpy_only():
    code = """
import sys
from cxr_study.predict.decision import Calibration, Calibrator
Calibration(Calibrator('temperature', dict(temperature=2.))).probability([1.])
sys.exit(bool({'torch', 'scipy', 'sklearn', 'pandas', 'matplotlib'} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    'module', ['calibrators', 'measures', 'thresholds', 'conformal', 'transfer']
)
def test_no_torch_in_calibration(module):
    code = f"""
import sys
import cxr_study.calibrate.{module}
sys.exit(bool({{'torch', 'sklearn'}} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- easy validation ---


def on_easy_validation(gap, errors=0, n=200, seed=0):
    "Two classes `gap` apart, whose logits spread less than that, and a few images on the wrong side"
    rng = np.random.default_rng(seed)
    label = np.arange(n) % 2
    logit = (label - 0.5) * gap + rng.normal(size=n) * gap / 20
    logit[:errors] *= -0.1
    names = [f'i{i}' for i in range(n)]
    return pd.DataFrame(
        dict(image_id=names, patient_id=names, split='val', label=label, logit=logit)
    )


@pytest.mark.parametrize('kind', ['auto', 'temperature', 'platt', 'beta', 'isotonic'])
@pytest.mark.parametrize('gap,errors', [(0.6, 0), (0.6, 1), (10.0, 0)])
def test_easy_validation_sharpens_no_logit_without_limit(kind, gap, errors):
    notes = []
    table = on_easy_validation(gap, errors)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        found, _ = ca.choose_calibrator(table, kind, notes=notes)
    probability = sigmoid(found(0.3))
    assert probability <= sigmoid(0.3 / 0.25) + 1e-6, (found, probability)
    if gap < 1 and kind != 'auto':
        assert 'Validation separates' in notes[-1] and found.parameters == dict(temperature=0.25)


def test_logits_without_information_are_not_flattened_without_limit():
    table = drawn(4000, lambda x: 30 * x, seed=3)
    notes = []
    noise = np.random.default_rng(0).normal(size=len(table)) * 200
    found = ca.fit_calibrator(
        'temperature', table.assign(logit=noise + 20 * table.label), notes=notes
    )
    assert found.parameters == dict(temperature=20.0) and 'hardly distinguish' in notes[0]


def test_an_ordinary_validation_is_fitted_as_before():
    notes = []
    for slope in (0.3, 1.0, 3.0):
        found = ca.fit_calibrator('temperature', drawn(600, lambda x, s=slope: s * x), notes=notes)
        np.testing.assert_allclose(found.parameters['temperature'], 1 / slope, rtol=0.3)
    assert notes == []


# --- validation to test ---


@pytest.mark.parametrize('seed', range(6))
def test_thresholds_of_arrays_are_those_of_the_rules(seed):
    "Also with ties, and with too few positive patients for any confidence"
    table = drawn(40 if seed == 5 else 500, seed=seed, images=1 + seed % 3)
    if seed % 2:
        table = table.assign(logit=table.logit.round(1))
    arrays = table.label.to_numpy() == 1, sigmoid(table.logit.to_numpy()), table.patient_id
    ours = pr._thresholds(*arrays, cost=4.0)
    theirs = {name: threshold for name, (threshold, _) in de.rules(table, 4.0).items()}
    assert list(ours) == list(theirs)
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=0, atol=1e-12)


def test_corrected_chances_are_those_of_a_plain_loop():
    rng = np.random.default_rng(0)
    deals, seen = rng.normal(size=(99, 5)), np.array([0.3, 2.5, 1.9, -1.0, 2.1])
    found = pr._step_down(deals, seen)
    left, highest = list(range(5)), 0.0
    while left:
        first = max(left, key=lambda j: seen[j])
        reached = sum(max(deal[j] for j in left) >= seen[first] for deal in deals)
        highest = max(highest, (1 + reached) / 100)
        assert found[first] == pytest.approx(highest)
        left.remove(first)


def two_sites(shift=0.0, seed=0):
    "Validation and test of one population, whose test logits are higher by `shift`"
    val, test = drawn(400, seed=seed, images=2), drawn(400, seed=seed + 1, images=2, split='test')
    return pd.concat([val, test.assign(logit=test.logit + shift)], ignore_index=True)


def test_patients_dealt_out_at_random_are_seldom_called_worse():
    "Negative control: each deal is a split without a shift. The level is 2.5 %; 5 % is two standard errors above"
    table = two_sites()
    calibration, _ = pr.fit_calibration(table[table.split == 'val'], kind='platt', replicates=20)
    pool = pr._pool_of(calibration, table, 'test')
    falls = pr._falls_by_chance(pool, 0.05, 9.0, deals=320, seed=0)
    others = {key: values[200:] for key, values in falls.items()}
    alarms = []
    for k in range(200):
        chances = pr._chances({key: values[k] for key, values in falls.items()}, others)
        alarms.append(min(chance['p_corrected'] for chance in chances.values()) <= 0.025)
    assert np.mean(alarms) <= 0.05, np.mean(alarms)
    assert 3 < next(iter(chances.values()))['independent'] < 20


def test_values_that_seldom_vary_raise_no_false_alarms():
    "Splits without a shift, most of whose values are 0: at most 2.5 % may be called worse"
    rng = np.random.default_rng(0)
    alarms = []
    for _ in range(400):
        falls = rng.poisson(0.05, size=(100, 10)) * rng.exponential(size=(100, 10))
        observed = dict(enumerate(falls[0]))
        chances = pr._chances(observed, dict(enumerate(falls[1:].T)))
        alarms.append(min((c['p_corrected'] for c in chances.values()), default=1) <= 0.025)
    assert np.mean(alarms) <= 0.04, np.mean(alarms)  # 2 % and two standard errors


def test_a_shift_is_found_where_it_is():
    table = two_sites(shift=2.0)
    calibration, _ = pr.fit_calibration(table[table.split == 'val'], kind='platt', replicates=20)
    rows = pr.validation_to_test(calibration, table, replicates=60)
    worse = {row['metric'] for row in rows if row['worse']}
    assert 'specificity' in worse and 'sensitivity' not in worse
    assert all(row['worse'] == pr.is_worse(row) for row in rows)


def both_splits(**columns):
    "Validation and test of one simulation, with these columns in place of its own"
    val = mt.simulate(patients=80, images=1, split='val', seed=1)
    test = mt.simulate(patients=80, images=1, seed=2)
    test = test.assign(patient_id='t' + test.patient_id)
    table = pd.concat([val, test], ignore_index=True)
    return table.assign(**{name: convert(table[name]) for name, convert in columns.items()})


def transfer_of(table):
    "Everything that is fitted on validation and compared with the test"
    val = table[table.split == 'val']
    calibration, comparison = pr.fit_calibration(val, notes=[], replicates=20)
    rows = pr.validation_to_test(calibration, table, replicates=20)
    return calibration.to_dict(), comparison, rows, ab.coverage(calibration.conformal, table)


@pytest.mark.parametrize('kind', [bool, float, object, 'uint8'])
def test_labels_of_any_kind_are_calibrated_alike(kind):
    assert transfer_of(both_splits(label=lambda label: label.astype(kind))) == transfer_of(
        both_splits()
    )


@pytest.mark.parametrize('column', ['label', 'logit'])
def test_a_calibration_that_would_be_wrong_is_rejected(column):
    convert = dict(label=lambda label: label.astype(str), logit=lambda x: x.where(x.index != 3))
    table = both_splits(**{column: convert[column]})
    calibration, _ = pr.fit_calibration(both_splits().query("split == 'val'"), replicates=20)
    calls = [
        lambda: ca.choose_calibrator(table),
        lambda: ca.fit_calibrator('platt', table),
        lambda: ab.fit_sets(table),
        lambda: ab.coverage(calibration.conformal, table),
        lambda: de.operating_points(table, replicates=20),
        lambda: pr.fit_calibration(table, replicates=20),
        lambda: pr.validation_to_test(calibration, table, replicates=20),
    ]
    for call in calls:
        with pytest.raises(PredictionError, match="cannot be evaluated"):
            call()


def test_images_without_patients_are_patients_of_their_own_in_a_comparison():
    own_name = both_splits().assign(patient_id=lambda table: table.image_id)
    assert transfer_of(own_name.assign(patient_id=np.nan)) == transfer_of(own_name)
