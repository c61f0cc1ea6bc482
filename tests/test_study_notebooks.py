"""The functions of the notebooks in `nbs/results`: small cases with a known answer, on simulated data."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from compare_recipes import (
    Cell,
    choice,
    compare,
    mean_interval,
    of_crops,
    of_rate,
    of_shape,
    one_at_a_time,
    ranking,
    some_patients,
    stressed,
    together,
)
from notebook_functions import functions_of
from scipy import stats
from torch import nn

from cxr_study.calibrate.transfer import validation_to_test
from cxr_study.core.options import POINTS
from cxr_study.core.run import StudyError
from cxr_study.data.cache import decoded
from cxr_study.data.images import Preprocess
from cxr_study.data.phantom import draw_phantom
from cxr_study.data.sets import phantom
from cxr_study.data.splits import make_split
from cxr_study.evaluate.metrics import metrics, scored, simulate
from cxr_study.explain.attribution import ExplainableModel, explain, share_in_region
from cxr_study.predict.decision import Calibration
from cxr_study.robust.corruptions import settings
from cxr_study.train.loaders import STRESS
from cxr_study.train.networks import Classifier, create_body
from cxr_study.train.recipe import Recipe
from cxr_study.train.training import Training, TrainingData, train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    "(decode, table of images): phantoms, decoded for a `Preprocess` with their split"
    folder, images = tmp_path_factory.mktemp("drawn"), phantom(images=160, pixels=64)

    def decode(spec):
        pixels, index, _ = decoded(images, spec, folder)
        return pixels, make_split(images, index.sha256)[0]

    return decode


@pytest.fixture(scope="module")
def films():
    images = phantom(images=20, pixels=64)
    return np.stack([images.source(i) for i in range(3)])


# --- 03 Stress and shape


def test_changes_of_the_acquisition(films):
    shape = functions_of("results/03_shape")
    film = films[0]
    for same in (
        shape.change_exposure(film, 1),
        shape.change_contrast(film, 1),
        shape.change_resolution(film, 1),
        shape.rotate(film, 0),
        shape.shift_by(film, 0, 0),
    ):
        assert (same == film).all()
    assert (shape.shift_by(film, 0.25, 0)[:, 16:] == film[:, :48]).all()
    assert (
        shape.change_exposure(film, 2).mean()
        < film.mean()
        < shape.change_exposure(film, 0.5).mean()
    )
    assert shape.stress_settings()[:2] == ["clean", "exposure/0.4"]
    assert {shape.stressed(films, s).shape for s in shape.stress_settings()} == {films.shape}
    assert (shape.with_width(films, 1.0) == films).all() and {
        shape.with_width(films, f).shape for f in shape.SHAPES
    } == {films.shape}
    with pytest.raises(StudyError, match="exposure, contrast"):
        shape.stressed(films, "voltage/3")


def test_stress_is_measured_against_the_film_as_it_is():
    "A change by nothing changes nothing; a planted loss is found by the range and by the sentence"
    shape, table = functions_of("results/03_shape"), simulate(patients=100, images=1, seed=0)
    logit = table.logit.to_numpy()
    found = shape.stress_table(table, dict.fromkeys(shape.stress_settings(), logit))
    assert len(found) == sum(len(s.amounts) for s in shape.CHANGES.values())
    assert (found.moved == 0).all() and (found.turned == 0).all() and found.auc.nunique() == 1
    lost = found.assign(sensitivity=np.where(found.amount == 20, 0.1, 0.9), specificity=0.9)
    assert shape.tolerance(lost)["rotation"] == (-30, 10)
    step = found.assign(sensitivity=np.where(found.amount == 10, 0.7, 0.9), specificity=0.9)
    assert (
        shape.costliest_step(step) == "among the smallest steps, rotation 10 costs most (20 points)"
    )


def test_figures_of_shapes_are_kept_by_name(tmp_path):
    shape, table = functions_of("results/03_shape"), simulate(patients=100, images=1, seed=0)
    rows = shape.shape_rows(table, {f: table.logit.to_numpy() for f in shape.SHAPES}).assign(
        split="val"
    )
    shape.write_shapes(dict(toy=rows), tmp_path / "shapes.csv")
    figures = json.loads((tmp_path / "shapes.json").read_text())["figures"]
    s = scored(table)
    assert figures["toy:val.1.auc"]["value"] == pytest.approx(metrics(s, s.ones)["auc"][0])
    assert len(pd.read_csv(tmp_path / "shapes.csv")) == len(shape.SHAPES)


# --- 04 Recipes

BASE = Cell(
    "base",
    Training("test_resnet", recipe=Recipe(epochs=1, batch_size=16, lr=1e-3, precision="fp32")),
    Preprocess(size=32),
)


def test_loss_under_stress_is_the_mean_over_changes(drawn, tmp_path):
    images, table = drawn(BASE.spec)
    data = TrainingData(images, table, BASE.spec)
    model, _ = train(BASE.training, data, tmp_path / "a.pt", say=str, device=CPU)
    found = stressed(model, images, table)
    assert found.loss[list(STRESS)].mean() == pytest.approx(found.loss["all"], abs=1e-6)


def test_what_is_compared_is_trained_once(drawn, tmp_path):
    "An interrupted comparison continues; the choice is the lowest mean"
    cell, said = BASE.differing(loss="focal", size=16), []
    assert (cell.name, cell.training.recipe.loss, cell.spec.size) == (
        "loss focal, size 16",
        "focal",
        16,
    )
    results = compare(
        [BASE, cell], [0, 1], drawn, tmp_path / "cells.csv", say=said.append, device=CPU
    )
    assert len(results) == len(said) == 4
    again = compare(
        [BASE, cell], [0, 1], drawn, tmp_path / "cells.csv", say=said.append, device=CPU
    )
    assert len(said) == 4 and again.equals(pd.read_csv(tmp_path / "cells.csv"))
    chosen = choice(again, tmp_path / "cells.json")
    assert (
        chosen
        == again.groupby("cell").stress_loss.mean().idxmin()
        == json.loads((tmp_path / "cells.json").read_text())["chosen"]
    )


def test_intervals_of_recipes_are_students():
    assert mean_interval([1, 2, 3]) == pytest.approx((2, 2 - 2.48414, 2 + 2.48414), abs=1e-4)
    table = pd.DataFrame(
        dict(cell=["base"] * 3 + ["b"] * 3, seed=[0, 1, 2] * 2, stress_loss=[1, 2, 3, 0, 1, 2])
    )
    first = ranking(table).iloc[0]
    assert (first.cell, first.difference, first.difference_upper) == ("b", -1, -1)


def test_recipes_that_are_compared(drawn):
    cells = one_at_a_time()
    assert len({cell.name for cell in cells}) == len(cells) == 15
    order = pd.DataFrame(
        dict(
            cell=["augment shift", "augment exposure", "ema 0.98", "size 96", "base", "loss focal"],
            difference=[-0.3, -0.2, -0.1, -0.1, 0, 0.1],
        )
    )
    assert together(cells, order).name == "augment shift, ema 0.98"
    assert [cell.name for cell in of_shape()] == [
        "base",
        "augment stretch",
        "augment stretch, size 96",
    ]
    assert [(c.training.recipe.augment, c.training.recipe.epochs) for c in of_crops()] == [
        ("equalise", 12),
        ("stretch", 12),
    ]
    assert [c.training.recipe.lr for c in of_rate()] == [0, 0.003]
    _, table = drawn(BASE.spec)
    few = some_patients(table, 40)
    assert set(few.split) == {"train", "val"} and 30 <= (few.split == "train").sum() <= 40


# --- 05 Validation to test, 06 recalibration


def seed_of(seed):
    "A seed's predictions: the same patients, another noise; logits too large, and higher by four on the test"
    tables = [
        simulate(patients=200, images=1, separation=2.5, split=split, seed=k)
        for k, split in enumerate(("val", "test"))
    ]
    table = pd.concat(
        [t.assign(patient_id=t.split + t.patient_id) for t in tables], ignore_index=True
    )
    noise = np.random.default_rng(seed).normal(size=len(table))
    return table.assign(logit=5 * table.logit + noise + 4 * (table.split == "test"))


def test_a_test_with_higher_logits_loses_specificity():
    transfer = functions_of("results/05_transfer")
    tables = {f"seed{k}": seed_of(k) for k in range(2)}
    fits = transfer.fit_all(dict(toy=tables), replicates=50)["toy"]
    found = transfer.before_after(tables, fits)
    assert (found["ece after"] < found["ece before"])[found.split == "val"].all()
    assert transfer.tried(tables, fits).chosen.sum() == 2
    rows = []
    for seed, table in tables.items():
        for row in validation_to_test(fits[seed], table, replicates=200):
            values = dict(validation=row["promised"]["value"], test=row["got"]["value"])
            rows.append(row | values | dict(seed=seed))
    rows = pd.DataFrame(rows)
    shown = transfer.seeds_table(rows).set_index(["threshold", "metric"])
    assert shown["not reproduced"]["half", "Specificity"] == "2 of 2"
    assert len(shown) == 3 * len(POINTS) + 4
    assert "at the cost of normal images" in transfer.class_sentence("toy", rows)
    goals = {seed: transfer.at_goal(t, fits[seed]) for seed, t in tables.items()}
    assert "the goal is NOT met" in transfer.goal_sentence("toy", goals)


def site(prevalence, shift=0.0, split="test", seed=1, patients=1500):
    "Calibrated logits at a prevalence of 0.6, of a site with another prevalence and with scores `shift` too high"
    table = simulate(patients=patients, images=1, prevalence=prevalence, split=split, seed=seed)
    return table.assign(
        logit=2 * (table.logit + shift) + np.log(0.6 / 0.4), patient_id=split + table.patient_id
    )


def test_a_correction_for_prevalence_helps_under_label_shift_alone():
    "If the scores are also higher, EM takes that for more sick patients"
    recal = functions_of("results/06_recalibration")
    rare, moved, val = site(0.3), site(0.3, shift=0.7), site(0.6, split="val", seed=2, patients=400)
    assert recal.em_prevalence(rare.logit, 0.6) == pytest.approx(rare.label.mean(), abs=0.03)
    assert recal.em_prevalence(moved.logit, 0.6) > moved.label.mean() + 0.05
    found = recal.correction_rows(pd.concat([val, rare]), Calibration())
    assert found.log_loss["chosen, true prevalence"] < found.log_loss["chosen"]
    alike, other = (recal.class_shift(pd.concat([val, test])) for test in (rare, moved))
    assert min(p for _, p in alike.values()) > 0.01 > max(p for _, p in other.values())


def test_local_cases_are_other_patients_than_those_judged():
    recal, s = functions_of("results/06_recalibration"), scored(simulate(patients=100, images=2))
    cases, rest = recal.local_cases(s, 10, 20, np.random.default_rng(0))
    assert (cases.sum(1) == 10).all() and not (cases * rest).any()
    for c, r in zip(cases, rest):
        assert set(s.patient[c > 0]).isdisjoint(s.patient[r > 0])


def test_local_cases_repair_a_shift_and_harm_little_without_one():
    recal = functions_of("results/06_recalibration")
    wrong, right = (
        recal.local_curve(table, ks=(10, 50), draws=30)
        for table in (site(0.3, shift=0.7), site(0.6))
    )
    loss = wrong.groupby(["way", "k"]).log_loss.mean()
    assert loss["both", 50] < loss["none", 50] and recal.cases_needed(wrong)[0] is not None
    loss = right.groupby(["way", "k"]).log_loss.mean()
    assert 0 < loss["both", 50] - loss["none", 50] < 0.05 and recal.cases_needed(right)[0] is None


# --- 07 Heat maps


@pytest.fixture(scope="module")
def network(drawn, tmp_path_factory):
    "(training, network, images, table): three epochs on phantoms"
    spec = Preprocess(size=64, standardise="image")
    images, table = drawn(spec)
    training = Training(
        "test_resnet", recipe=Recipe(epochs=2, batch_size=16, lr=3e-3, precision="fp32")
    )
    model, _ = train(
        training,
        TrainingData(images, table, spec),
        tmp_path_factory.mktemp("network") / "a.pt",
        say=str,
        device=CPU,
    )
    return training, model, images, table


def test_likeness_of_maps():
    maps, rng = functions_of("results/07_maps"), np.random.default_rng(0)
    one = rng.random((8, 32, 32)).astype(np.float32)
    one[0] = 0  # A map without evidence has no order
    for value in maps.similarity(one, one).values():
        assert value[1:] == pytest.approx(1, abs=1e-4)
    assert (
        maps.spearman(one, -one)[1:] == pytest.approx(-1, abs=1e-4)
        and maps.spearman(one, one)[0] == 0
    )
    assert maps.above_floor(one, one)["spearman"][1:].min() > 0.5


def test_random_weights_leave_nothing_of_the_body(network):
    maps, (_, model, images, _) = functions_of("results/07_maps"), network
    inside = ExplainableModel(model)
    z = inside.normalised(np.array(images[:16]))
    head, whole = maps.randomised(inside, 0, z), maps.randomised(inside, 1, z)
    assert torch.equal(head.body(z), inside.body(z))
    assert not torch.allclose(whole.body(z), inside.body(z)) and whole.body(z).std() > 0


def test_permuted_labels_keep_patients_together(drawn):
    maps, (_, table) = functions_of("results/07_maps"), drawn(BASE.spec)
    nonsense = maps.permuted(table)
    assert list(nonsense.image_id) == list(table.image_id)
    assert (nonsense.groupby("patient_id").label.nunique() == 1).all() and 0.3 < (
        nonsense.label != table.label
    ).mean() < 0.7


def test_taking_away_what_a_map_marks_tells_good_maps_from_bad(network):
    "A toy network that looks at the left half alone"
    maps, (_, model, _, _) = functions_of("results/07_maps"), network
    inside, some = (
        ExplainableModel(model),
        np.random.default_rng(0).integers(0, 256, (16, 64, 64), np.uint8),
    )

    class LeftHalf(nn.Module):
        def forward(self, z):
            return (z[..., : z.shape[-1] // 2] ** 2).mean((1, 2, 3))[:, None]

        def normalised(self, images):
            return inside.normalised(images)

    left = np.tile(np.linspace(1, 0, 64, dtype=np.float32), (16, 64, 1))
    assert (maps.faithfulness(LeftHalf(), some, left) > 0).all() and (
        maps.faithfulness(LeftHalf(), some, left[..., ::-1]) < 0
    ).all()
    assert np.abs(maps.noisy(some).astype(int) - some).max() < 12


def test_all_tests_of_one_network(network, tmp_path):
    "The table has a cell for each method and test; a map like the original despite random weights fails"
    maps, (training, model, images, table) = functions_of("results/07_maps"), network
    inside, some, ids = ExplainableModel(model), np.array(images[:24]), table.patient_id[:24]
    other, _ = train(
        dataclasses.replace(training, seed=1),
        TrainingData(images, table, model.spec),
        tmp_path / "b.pt",
        say=str,
        device=CPU,
    )
    wrong, _ = maps.train_on_permuted_labels(
        training, images, table, model.spec, tmp_path / "c.pt", say=str, device=CPU
    )
    found = maps.cascade(inside, some, ["CAM", "EigenCAM"], draws=2)
    assert list(found["CAM"]) == list(maps.SHARES)
    values = maps.values_of_tests(inside, some, found, wrong, [model, other])
    results = maps.results_of(values, ids)
    shown = maps.sanity_table(results)
    assert list(shown.index) == ["CAM", "EigenCAM"] and list(shown) == list(maps.TESTS)
    assert (
        maps.sanity_sentence(results).startswith("Recommended: ")
        and len(maps.sanity_details(results)) == 12
    )
    assert not results["EigenCAM"]["head"]["passed"]  # It never asks the head
    heat = explain(inside, some)
    assert not maps.result_of("weights", maps.above_floor(heat, heat), ids)["passed"]
    assert maps.sanity_figure(found, ids, results).axes


def test_the_recommendation_needs_faithfulness():
    maps = functions_of("results/07_maps")

    def made(passed, value):
        return {
            t: dict(passed=t in passed, figures=dict(logits=dict(value=value))) for t in maps.TESTS
        }

    vain, plain, better = (
        made(["weights", "labels", "noise"], 3.0),
        made(["head", "faithful"], 1.0),
        made(["noise", "faithful"], 2.0),
    )
    assert [
        maps.recommended(r)
        for r in (dict(vain=vain, plain=plain), dict(plain=plain, better=better), dict(vain=vain))
    ] == ["plain", "better", None]
    assert [*maps.spread_out([0.1, 0], 0.5), *maps.spread_out([2, 0], 0.5)] == pytest.approx(
        [0.3, -0.2, 2, 0]
    )


# --- 11 Planted lesions


def test_the_mask_itself_wins_every_game():
    lesions, table = functions_of("results/11_planted_lesions"), phantom(images=60, pixels=64).table
    sick = table[table.label == 1]
    masks = np.stack([draw_phantom(row, pixels=64)[1] for row in sick.itertuples()])
    perfect = masks.astype(np.float32)
    assert (
        lesions.pointing(perfect, masks).all()
        and lesions.localisation(perfect, masks, sick.patient_id)["pointing"]["value"] == 1
    )
    assert share_in_region(perfect, masks) == pytest.approx(1) and lesions.auprc(
        perfect, masks
    ) == pytest.approx(1)
    assert (
        lesions.pointing(perfect[:, ::-1], masks).mean() < 0.5
        and lesions.auprc(perfect[:, ::-1], masks).mean() < 0.5
    )


def test_networks_with_small_cells_and_steady_maps(films):
    lesions = functions_of("results/11_planted_lesions")
    for arch in ("fine_resnet", "narrow_resnet"):
        assert create_body(arch)(torch.zeros(1, 3, 96, 96)).shape == (1, 48, 24, 24)
    picture = np.arange(25).reshape(1, 5, 5)
    assert (lesions.moved(picture, 1, 0)[0, 1:] == picture[0, :-1]).all()
    assert (
        lesions.moved(lesions.moved(picture, 1, -1), -1, 1)[0, 1:-1, 1:-1] == picture[0, 1:-1, 1:-1]
    ).all()
    toy, mirrored = (
        Classifier(create_body("narrow_resnet"), Preprocess(size=64)),
        np.ascontiguousarray(films[..., ::-1]),
    )
    assert (
        np.abs(lesions.steady(toy, films)[..., ::-1] - lesions.steady(toy, mirrored)).max() < 1e-3
    )


def test_changes_of_a_picture():
    lesions, plain = (
        functions_of("results/11_planted_lesions"),
        np.full((2, 128, 128), 90, np.uint8),
    )
    assert all(lesions.marker(128, corner).any() for corner in lesions.CORNERS)
    assert (lesions.blank_corners(lesions.with_marker(plain)) == plain).all() and (
        lesions.cropped(plain) == plain
    ).all()
    marked = lesions.with_marker(plain)
    assert (lesions.mirrored(lesions.mirrored(marked)) == marked).all() and (
        lesions.mirrored(marked) != marked
    ).any()


def test_rows_of_shortcuts():
    lesions, small = functions_of("results/11_planted_lesions"), phantom(images=24, pixels=64)
    pictures = np.stack([small.source(i) for i in range(24)])
    torch.manual_seed(0)
    rows = lesions.shortcut_rows(
        Classifier(create_body("test_resnet"), Preprocess(size=64)),
        pictures,
        small.table.label,
        small.table.patient_id,
    )
    assert [r["change"] for r in rows] == list(lesions.CHANGES) and rows[0]["logit"]["n"] == 24
    assert lesions.shortcut_figure(rows).axes


# --- 08 Other hospitals, 10 corruptions, 12 coverage


def test_sentences_are_derived_from_figures():
    other, corrupted = (
        functions_of("results/08_other_hospitals"),
        functions_of("results/10_corruptions"),
    )
    reports = dict(
        a=dict(
            promises=[
                dict(point="half", metric="sensitivity", kept=True, worse=True),
                dict(point="half", metric="specificity", kept=False, worse=False),
                dict(point="in use", metric="accuracy", kept=False, worse=None),
            ]
        )
    )
    assert (
        other.promise_sentence(reports["a"])
        == "1 of 2 validation values are reproduced (specificity at half)."
    )
    assert (
        "NOT met by all" in corrupted.verdict_sentence([0.9, 1.1], 1.0)
        and corrupted.verdict_sentence([0.9], 0.8).count(" met") == 2
    )


def test_a_network_does_not_differ_from_itself_under_corruptions():
    corrupted, table = (
        functions_of("results/10_corruptions"),
        simulate(patients=60, images=1, seed=0),
    )
    pair = (table, dict.fromkeys(settings(), table.logit.to_numpy()))
    found = corrupted.difference(pair, pair, 50)
    assert {k: e["value"] for k, e in found.items()} == dict.fromkeys(
        ("clean", "corrupted", "be", "rbe", "rbe_harmful"), 0.0
    )
    assert "+0.000 is in what" in corrupted.added_sentence(pair, pair, 20)
    assert "BE" in corrupted.scores_table(dict(toy=pair))
    shuffled = (table.assign(image_id=table.image_id.iloc[::-1].to_numpy()), pair[1])
    with pytest.raises(StudyError, match="not of the same images"):
        corrupted.difference(pair, shuffled, 5)


def test_the_truth_of_the_simulation_is_that_of_many_patients():
    many = scored(simulate(patients=20_000))
    for name, true in functions_of("results/12_interval_coverage").true_values().items():
        assert metrics(many, many.ones)[name][0] == pytest.approx(true, abs=0.01)


# --- 16 First edition


def test_the_interval_that_the_first_edition_published():
    values = np.array([0.983, 0.984, 0.985, 0.986, 0.990])
    entry = dict(value=values.mean(), sd=values.std(ddof=1), seeds=5)
    found = functions_of("results/16_first_edition").student_interval(entry)
    known = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert [found["lower"], found["upper"]] == pytest.approx([known.low, known.high], abs=1e-12)
