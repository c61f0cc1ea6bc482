"""Every number in `summary.csv` follows from the committed predictions; every number of others has a source."""

import base64
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from notebook_functions import functions_of
from PIL import Image
from publish import light_png, publish, publish_outputs
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    brier_score_loss,
    recall_score,
    roc_auc_score,
)
from write_summary import (
    MEASURES,
    calibrated_test,
    ensemble_test,
    experiment_figures,
    summary_table,
    together,
    values_of,
    write_summary,
)

from cxr_study.calibrate.transfer import fit_calibration
from cxr_study.core.run import ManifestMismatch, Run, StudyError, sha256
from cxr_study.data.audit import write_audit
from cxr_study.evaluate.evaluation import evaluate_table
from cxr_study.evaluate.metrics import simulate
from cxr_study.pipeline.published import (
    PUBLISHED_FILES,
    check_published,
    experiment_of,
    is_variant,
    published_experiments,
    training_parameters,
)
from cxr_study.pipeline.sweep import read_sweep
from cxr_study.predict.table import read_predictions, write_predictions

RESULTS = ROOT / "results/first_edition"
SUMMARY = functions_of("results/01_summary")
SEEDS = sorted(p.parent for p in RESULTS.glob("*/seed*/predictions.csv"))


@pytest.fixture(scope="module")
def committed():
    return SUMMARY.read_summary()


def probabilities(folder):
    "Labels and probabilities of the test in the order of the images, read without the library"
    table = pd.read_csv(folder / "predictions.csv").query("split == 'test'").sort_values("image_id")
    return table.label.to_numpy(), 1 / (1 + np.exp(-table.logit.to_numpy()))


def by_sklearn(label, p):
    called = p >= 0.5
    return dict(
        auc=roc_auc_score(label, p),
        accuracy=accuracy_score(label, called),
        sensitivity=recall_score(label, called),
        specificity=recall_score(label, called, pos_label=0),
        balanced_accuracy=balanced_accuracy_score(label, called),
        brier=brier_score_loss(label, p),
    )


def test_the_committed_summary_is_what_the_predictions_give(committed):
    again = summary_table(replicates=2000)
    assert list(again.columns) == list(committed.columns) and len(again) == len(committed)
    for name in committed:
        old, new = committed[name], again[name]
        if pd.api.types.is_numeric_dtype(old):
            np.testing.assert_allclose(
                new.astype(float), old.astype(float), atol=2e-6, err_msg=name
            )
        else:
            assert list(old.fillna("")) == list(new.astype(object).fillna("")), name


def test_the_committed_ensembles_of_all_networks_are_what_the_predictions_give():
    recomputed = together(replicates=2000)
    committed = json.loads((RESULTS / "together.json").read_text())["figures"]
    assert set(recomputed) == set(committed)
    for name, entry in recomputed.items():
        for k in ("value", "lower", "upper"):
            assert entry[k] == pytest.approx(committed[name][k], abs=2e-6), (name, k)


def test_scikit_learn_finds_the_same_figures(committed):
    "Seeds, means and ensembles, computed from the CSV files alone"
    for experiment, part in committed.groupby("experiment"):
        rows, found = (
            part.set_index("who"),
            {f.name: probabilities(f) for f in SEEDS if f.parent.name == experiment},
        )
        assert set(found) == {w for w in rows.index if w.startswith("seed")}
        figures = {seed: by_sklearn(*pair) for seed, pair in found.items()}
        if len(found) > 1:
            figures["ensemble"] = by_sklearn(
                next(iter(found.values()))[0], np.mean([p for _, p in found.values()], axis=0)
            )
            figures["mean"] = {
                m: np.mean([figures[s][m] for s in found]) for m in figures["ensemble"]
            }
            sd = {m: np.std([figures[s][m] for s in found], ddof=1) for m in figures["ensemble"]}
            for m, v in sd.items():
                assert rows[f"{m}_sd"]["mean"] == pytest.approx(v, abs=2e-6)
        assert set(figures) == set(rows.index)
        for who, values in figures.items():
            for m, v in values.items():
                assert rows[m][who] == pytest.approx(v, abs=2e-6), (experiment, who, m)


def test_figures_that_texts_quote_are_those_of_the_table(committed):
    figures = json.loads((RESULTS / "summary.json").read_text())["figures"]
    assert len(figures) == len(committed) * len(MEASURES)
    for r in committed.to_dict("records"):
        for m in MEASURES:
            assert figures[f"{r['experiment']}:{r['who']}.{m}"]["value"] == pytest.approx(
                r[m], abs=2e-6
            )


@pytest.mark.parametrize("folder", SEEDS, ids=lambda p: "/".join(p.parts[-2:]))
def test_published_runs_are_whole_and_real(folder):
    run = check_published(folder)
    assert (
        run.manifest["synthetic"] is False
        and f"seed{run.manifest['parameters']['seed']}" == folder.name
    )
    experiment = experiment_of(run)[0]
    assert (
        folder.parent.name.startswith(experiment + "-")
        if is_variant(folder)
        else folder.parent.name == experiment
    )
    splits = (
        pd.read_csv(folder / "predictions.csv", dtype={"patient_id": str})
        .groupby("split")
        .patient_id.agg(set)
    )
    assert set(splits.index) == {"val", "test"} and not splits["val"] & splits["test"]


def test_the_published_sweep_trains_what_is_published(data):
    "Every seed of a current recipe is a run of `published.yaml`, with the same data and training parameters"
    jobs = {
        (f"{j.values['dataset']}-{j.values['arch']}", f"seed{j.values['seed']}"): j.values
        for j in read_sweep(RESULTS / "published.yaml").jobs
    }
    published = {
        (f.parent.name, f.name): training_parameters(Run(f, verify=False))
        for f in SEEDS
        if not is_variant(f)
    }
    assert set(jobs) == set(published)
    for name, recipe in published.items():
        assert {k: jobs[name][k] for k in recipe} == recipe, name


@pytest.mark.parametrize("name", ["pneumoniamnist", "chest_xray", "nih_chestxray14"])
def test_datasheets_are_those_of_the_data(name, data, tmp_path):
    write_audit(name, tmp_path)
    assert (tmp_path / "datasheet.md").read_text() == (
        ROOT / f"results/datasheets/{name}.md"
    ).read_text()


def test_a_published_calibration_follows_from_the_validation_rows():
    "The newest experiment's first seed: the same calibrator and thresholds from predictions.csv alone"
    folder = next(f for f in SEEDS if (f / "calibration.json").is_file())
    said, table = (
        json.loads((folder / "calibration.json").read_text()),
        read_predictions(folder / "predictions.csv"),
    )
    found = fit_calibration(
        table[table.split == "val"],
        seed=Run(folder, verify=False).manifest["parameters"]["seed"],
        replicates=2,
    )[0].to_dict()
    assert found["calibrator"]["kind"] == said["calibrator"]["kind"]
    assert [p["threshold"] for p in found["operating_points"]] == pytest.approx(
        [p["threshold"] for p in said["operating_points"]], abs=1e-9
    )


def test_goals_are_met_or_missed_as_the_figures_say(committed):
    shown = SUMMARY.goal_table(committed)
    for said, r in zip(shown.to_dict("records"), SUMMARY.main_rows(committed).to_dict("records")):
        truth = dict(
            floor=r["auc"] >= 0.989 and r["accuracy"] >= 0.916,
            goal=r["auc"] >= 0.991 and r["accuracy"] >= 0.946,
            beyond=r["auc"] >= 0.995 and r["accuracy"] >= 0.958,
            threshold=r["sensitivity_promised"] >= 0.95 and r["specificity_promised"] > 0.81,
            ece=r["ece_calibrated"] <= 0.05,
            brier=r["brier_calibrated"] < 0.08,
        )
        for goal, ok in truth.items():
            verdict = "met" if ok else "missed"
            if r["dataset"] == "chest_xray" and goal in ("floor", "goal", "beyond"):
                verdict = "a goal of another test"
            assert said[SUMMARY.HEADINGS[goal]].startswith(verdict), (
                r["experiment"],
                r["who"],
                goal,
            )


def test_the_ensemble_rule_uses_each_members_own_validation():
    "Thresholds and calibrators are the members'; no row of one seed's validation decides for another seed"
    several = [runs for runs in published_experiments().values() if len(runs) > 1]
    if not several:
        pytest.skip("no experiment has two seeds")
    members = {seed: calibrated_test(run) for seed, run in several[0].items()}
    joint = ensemble_test(members)
    thresholds = [member.threshold for member in members.values()]
    assert joint.threshold == pytest.approx(np.mean(thresholds))
    sorted_logits = [
        member.calibrated.sort_values("image_id").logit.to_numpy() for member in members.values()
    ]
    expected = np.mean([1 / (1 + np.exp(-logit)) for logit in sorted_logits], axis=0)
    np.testing.assert_allclose(1 / (1 + np.exp(-joint.calibrated.logit)), expected, atol=1e-9)


def test_every_figure_of_others_has_its_source_and_its_protocol():
    table = SUMMARY.read_literature()
    assert len(table) > 25 and {"validation", "test", "not stated"} <= set(table.chosen_on)
    assert (
        table.reference.str.match(r"https://(doi\.org/10\.|github\.com/)|its own report").all()
        and table.differs.notna().all()
    )
    assert not table.duplicated(["source", "model", "input"]).any()
    for m in ("auc", "accuracy"):
        assert table[m].dropna().between(0.5, 1).all()
    assert (
        table.auc.isna()
        | table.auc_lower.isna()
        | ((table.auc_lower < table.auc) & (table.auc < table.auc_upper))
    ).all()
    assert (table[table.source.str.startswith("MedViTV2")].chosen_on == "test").all()


@pytest.fixture
def copy(tmp_path):
    "The first two seeds of a published experiment as if they were the only ones"
    first = next(f.parent for f in SEEDS if (f / "calibration.json").is_file())
    for seed in sorted(first.glob("seed*"))[:2]:
        shutil.copytree(seed, tmp_path / "results" / first.name / seed.name)
    return tmp_path / "results"


def test_another_prediction_gives_another_summary_or_none(copy):
    "A changed prediction is rejected, and so is a seed of another recipe"
    file = next(copy.glob("*/seed0/predictions.csv"))
    text = file.read_text()
    file.write_text(text.replace(",0,", ",1,", 1))
    with pytest.raises(ManifestMismatch, match="predictions.csv"):
        summary_table(copy)
    file.write_text(text)
    seed = file.parent.with_name("seed7")
    shutil.copytree(file.parent, seed)
    manifest = json.loads((seed / "manifest.json").read_text())
    manifest["stages"]["04_training"]["parameters"]["augment"] = "none"
    (seed / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StudyError, match="differ in augment"):
        summary_table(copy)


def test_publishing_that_is_interrupted_is_noticed(copy, tmp_path, monkeypatch):
    "The manifest is written last, so a mixture of two runs does not match it"
    old, new = next(copy.glob("*/seed0")), tmp_path / "run"
    shutil.copytree(old, new)
    run = Run(new, verify=False)
    (new / "predictions.csv").write_text(
        (new / "predictions.csv").read_text().replace(",0,", ",1,", 1)
    )
    run.manifest["artefacts"] = {
        n: dict(sha256=sha256(new / n), stage=a["stage"])
        for n, a in run.manifest["artefacts"].items()
        if n in PUBLISHED_FILES
    }
    (new / "report.html").write_text("<html></html>")
    run.manifest["artefacts"]["report.html"] = dict(
        sha256=sha256(new / "report.html"), stage="report"
    )
    run.save_manifest()
    real, done = shutil.copyfile, []

    def fails(source, target):
        done.append(Path(source).name)
        if done[-1] == "model.json":
            raise OSError(28, "No space left on device")
        return real(source, target)

    monkeypatch.setattr(shutil, "copyfile", fails)
    with pytest.raises(StudyError, match="disk is full"):
        publish(new, copy)
    with pytest.raises(ManifestMismatch, match="predictions.csv"):
        check_published(old)
    monkeypatch.setattr(shutil, "copyfile", real)
    assert check_published(publish(new, copy)).folder == old


def test_synthetic_and_unfinished_runs_are_not_published(tmp_path):
    run = Run(tmp_path / "run").begin("01_data", seed=0)
    run.finish(synthetic=True)
    with pytest.raises(StudyError, match="is not finished, it has no predictions.csv"):
        publish(tmp_path / "run", tmp_path / "results")
    assert not (tmp_path / "results").exists()


# --- The tools, on a simulated experiment of three seeds

PATIENTS = [
    simulate(patients=200, images=1.5, separation=3.0, split=split, seed=k)
    for k, split in enumerate(("val", "test"))
]
BASE = pd.concat([t.assign(patient_id=t.split + t.patient_id) for t in PATIENTS])


def example_run(folder, seed, synthetic=False, augment="standard"):
    "A finished run with simulated predictions; every seed has the same patients and other noise"
    table = BASE.assign(logit=2 * BASE.logit + np.random.default_rng(seed).normal(size=len(BASE)))
    run = Run(folder / f"runs/{augment}-{seed}-{synthetic}").begin("01_data", seed=seed)
    run.write("preprocess.json", dict(size=64))
    run.finish(synthetic=synthetic, data=dict(dataset="example", patients_known=True))
    run.begin("02_training", arch="tiny", weights="none", augment=augment, seed=seed)
    write_predictions(table, run.path("predictions.csv"))
    run.add("predictions.csv")
    run.write("model.json", dict(arch="tiny"))
    run.write("history.csv", pd.DataFrame(dict(epoch=[0, 1], train_loss=0.5, valid_loss=0.5)))
    run.finish()
    run.begin("03_evaluation").write("metrics.json", evaluate_table(table, replicates=50))
    run.finish()
    calibration = fit_calibration(table[table.split == "val"], kind="temperature", replicates=20)[0]
    run.begin("04_calibration").write("calibration.json", calibration.to_dict())
    run.finish()
    run.begin("report").write("report.html", "<html></html>")
    run.finish()
    return run.folder


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    "Folder with the results of three published seeds"
    folder = tmp_path_factory.mktemp("example")
    for seed in range(3):
        publish(example_run(folder, seed), folder / "results")
    return folder


def test_a_published_seed_holds_what_is_published(example):
    assert [p.relative_to(example).as_posix() for p in sorted(example.glob("results/*/*"))] == [
        f"results/example-tiny/seed{k}" for k in range(3)
    ]
    assert sorted(p.name for p in (example / "results/example-tiny/seed0").iterdir()) == sorted(
        (*PUBLISHED_FILES, "manifest.json")
    )
    with pytest.raises(StudyError, match="only runs of real radiographs are published"):
        publish(example_run(example, 9, synthetic=True), example / "results")


def test_the_tools_are_commands(example):
    done = subprocess.run(
        [sys.executable, ROOT / "tools/publish.py", example / "runs/standard-9-True"],
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 1
        and done.stderr.startswith("Error: ")
        and "Traceback" not in done.stderr
    )
    done = subprocess.run(
        [sys.executable, ROOT / "tools/write_summary.py", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "summary.csv" in done.stdout


def test_summary_of_simulated_seeds(example):
    "An ensemble of one seed equals that seed, an ensemble of three ranks better than their mean, and both files agree"
    runs = published_experiments(example / "results")["example-tiny"]
    tests = {seed: calibrated_test(run) for seed, run in runs.items()}
    first = values_of(tests["seed0"])
    of_one_seed = values_of(ensemble_test({"seed0": tests["seed0"]}))
    assert of_one_seed == pytest.approx(first, abs=1e-9)
    figures = runs["seed0"].read("metrics.json")["figures"]
    assert first["auc"] == pytest.approx(figures["test.auc"]["value"])
    mean_auc = np.mean([values_of(test)["auc"] for test in tests.values()])
    assert values_of(ensemble_test(tests))["auc"] > mean_auc
    assert list(experiment_figures(runs, replicates=50)) == [
        "seed0",
        "seed1",
        "seed2",
        "mean",
        "ensemble",
    ]
    table = write_summary(example / "results", replicates=50)
    named = json.loads((example / "results/summary.json").read_text())["figures"]
    assert named["example-tiny:mean.auc"]["value"] == pytest.approx(
        table.set_index("who").auc["mean"]
    )
    assert named["example-tiny:ensemble.ece"]["lower"] is None
    both = json.loads((example / "results/together.json").read_text())["figures"]
    assert both["example.auc"]["value"] == pytest.approx(
        table.set_index("who").auc["ensemble"], abs=1e-6
    )


def test_the_page_of_simulated_seeds(example):
    table = (
        SUMMARY.read_summary(example / "results")
        if (example / "results/summary.csv").exists()
        else write_summary(example / "results", 50)
    )
    assert (
        SUMMARY.experiment_title(table.iloc[0])
        == "example, tiny from scratch, 64 px, augment standard"
    )
    shown = SUMMARY.results_table(table)
    assert "±" in shown.iloc[0, 0] and " to " in shown.iloc[0, 1]
    assert SUMMARY.main_rows(table).who.tolist() == ["mean", "ensemble"] and SUMMARY.main_rows(
        table[:1]
    ).who.tolist() == ["seed0"]
    assert SUMMARY.goal_table(table)[SUMMARY.HEADINGS["beyond"]].str.startswith("missed").all()
    assert "MISSES" in SUMMARY.goal_sentence(table[table.who == "mean"].iloc[0])


def test_bounds_of_the_goal_count_as_declared():
    cases = [
        ("auc", 0.989),
        ("specificity_promised", 0.81),
        ("ece_calibrated", 0.05),
        ("brier_calibrated", 0.08),
    ]
    assert [SUMMARY.meets(m, bound, bound) for m, bound in cases] == [True, False, True, False]


def test_a_recipe_that_changes_nothing_changes_nothing(example):
    "Another augmentation in the manifest, the same predictions"
    old = published_experiments(example / "results")["example-tiny"]
    new = {f"seed{k}": Run(example_run(example, k, augment="equalise")) for k in range(3)}
    assert SUMMARY.pairs(dict(new=new, old=old)) == [("new", "old")]
    same = SUMMARY.step_table(dict(new=new, old=old), replicates=20)
    assert (same.change == 0).all() and not same.clear.any() and set(same.split) == {"val", "test"}
    assert SUMMARY.step_sentences(same)[0].endswith("no measure of the test changed clearly.")
    none, wide, right = (dict(lower=a, upper=b) for a, b in ((None, None), (-1.0, 1.0), (1.0, 2.0)))
    assert [SUMMARY.is_clear(e) for e in (none, wide, right)] == [False, False, True]


def test_a_bundle_names_its_published_run(example):
    bundle = example / "models/example/bundle.json"
    bundle.parent.mkdir(parents=True)
    bundle.write_text(
        json.dumps(
            dict(predictions_sha256=sha256(example / "results/example-tiny/seed1/predictions.csv"))
        )
    )
    assert {
        name: run.folder.name
        for name, run in SUMMARY.shipped(example / "models", example / "results").items()
    } == dict(example="seed1")
    assert SUMMARY.shipped(example / "nowhere", example / "results") == {}


def notebook(*texts, output=""):
    "A notebook whose first cell holds the parameters, and whose last has printed this"
    made = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(t, id=f"cell{i}") for i, t in enumerate(texts)]
    )
    made.cells[0].metadata["tags"] = ["parameters"]
    made.cells[-1].outputs = [nbformat.v4.new_output("stream", text=output)] if output else []
    return made


def test_outputs_are_published_only_for_the_code_that_gave_them(tmp_path):
    run, target = example_run(tmp_path, 0), tmp_path / "nbs/03_evaluation.ipynb"
    target.parent.mkdir()
    (run / "notebooks").mkdir()
    nbformat.write(notebook("seed = 0", "#| slow\nprint(auc)"), target)
    nbformat.write(
        notebook("seed = 0", "#| slow\nprint(auc)", output="an AUC"),
        run / "notebooks/03_evaluation.ipynb",
    )
    assert publish_outputs(run, tmp_path / "nbs") == ["03_evaluation"]
    assert nbformat.read(target, 4).cells[1].outputs[0].text == "an AUC"
    nbformat.write(notebook("seed = 0", "#| slow\nprint(accuracy)"), target)
    with pytest.raises(StudyError, match="03_evaluation has changed since"):
        publish_outputs(run, tmp_path / "nbs")


def test_images_get_a_palette_once():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(
        buffer, "png"
    )
    noisy = base64.b64encode(buffer.getvalue()).decode()
    assert len(light_png(noisy)) < len(noisy) and light_png(light_png(noisy)) == light_png(noisy)


def test_the_page_needs_no_torch():
    code = """
import sys
sys.path.insert(0, "tools")
from notebook_functions import functions_of
summary = functions_of("results/01_summary")
ours = summary.both_editions(summary.read_summary(), summary.read_four_sets())
summary.literature_figure(summary.read_literature(), ours)
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
