"""What is published: every figure of `results/summary.csv` follows from the committed predictions, and every figure of others has its source."""
import json, shutil, subprocess, sys
from pathlib import Path
import numpy as np, pandas as pd, pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, brier_score_loss, recall_score, roc_auc_score
from conftest import ROOT
from notebook_functions import functions_of
from cxr_study.data.audit import write_audit
from cxr_study.core.run import ManifestMismatch, Run, StudyError
from cxr_study.calibrate.transfer import fit_calibration
from cxr_study.pipeline.published import is_variant
from cxr_study.pipeline.sweep import read_sweep

RESULTS = ROOT/"results"
SEEDS = sorted(p.parent for p in RESULTS.glob("*/seed*/predictions.csv"))


@pytest.fixture(scope="module")
def committed(): return rs.read_summary()


def probabilities(folder):
    "(labels, probabilities) of the test, in the order of the images, without a line of the library"
    table = pd.read_csv(folder/"predictions.csv").query("split == 'test'").sort_values("image_id")
    return table.label.to_numpy(), 1/(1 + np.exp(-table.logit.to_numpy()))


def by_sklearn(label, p):
    called = p >= .5
    return dict(auc=roc_auc_score(label, p), accuracy=accuracy_score(label, called), sensitivity=recall_score(label, called), specificity=recall_score(label, called, pos_label=0),
                balanced_accuracy=balanced_accuracy_score(label, called), brier=brier_score_loss(label, p))


def test_the_committed_summary_is_what_the_predictions_give(committed):
    again = rs.summary_table(replicates=2000)
    assert list(again.columns) == list(committed.columns) and len(again) == len(committed)
    for name in committed:
        old, new = committed[name], again[name]
        if pd.api.types.is_numeric_dtype(old): np.testing.assert_allclose(new.astype(float), old.astype(float), atol=2e-6, err_msg=name)
        else: assert list(old.fillna("")) == list(new.astype(object).fillna("")), name


def test_scikit_learn_finds_the_same_figures(committed):
    "Seeds and means and ensembles, from the csv files alone"
    for experiment, part in committed.groupby("experiment"):
        rows, found = part.set_index("who"), {f.name: probabilities(f) for f in SEEDS if f.parent.name == experiment}
        assert set(found) == {w for w in rows.index if w.startswith("seed")}
        figures = {seed: by_sklearn(*pair) for seed, pair in found.items()}
        if len(found) > 1:
            figures["ensemble"] = by_sklearn(next(iter(found.values()))[0], np.mean([p for _, p in found.values()], axis=0))
            figures["mean"] = {m: np.mean([figures[s][m] for s in found]) for m in figures["ensemble"]}
            sd = {m: np.std([figures[s][m] for s in found], ddof=1) for m in figures["ensemble"]}
            for m, v in sd.items(): assert rows[f"{m}_sd"]["mean"] == pytest.approx(v, abs=2e-6)
        assert set(figures) == set(rows.index)
        for who, values in figures.items():
            for m, v in values.items(): assert rows[m][who] == pytest.approx(v, abs=2e-6), (experiment, who, m)


def test_figures_that_texts_quote_are_those_of_the_table(committed):
    figures = json.loads((RESULTS/"summary.json").read_text())["figures"]
    assert len(figures) == len(committed)*len(rs.MEASURES)
    for r in committed.to_dict("records"):
        for m in rs.MEASURES: assert figures[f"{r['experiment']}:{r['who']}.{m}"]["value"] == pytest.approx(r[m], abs=2e-6)


@pytest.mark.parametrize("folder", SEEDS, ids=lambda p: "/".join(p.parts[-2:]))
def test_published_runs_are_whole_and_real(folder):
    run = rs.check_published(folder)
    assert run.manifest["synthetic"] is False and f"seed{run.manifest['parameters']['seed']}" == folder.name
    experiment = rs.experiment_of(run)[0]
    assert folder.parent.name.startswith(experiment + "-") if is_variant(folder.parent.name) else folder.parent.name == experiment
    splits = pd.read_csv(folder/"predictions.csv", dtype={"patient_id": str}).groupby("split").patient_id.agg(set)
    assert set(splits.index) == {"val", "test"} and not splits["val"] & splits["test"]


def test_the_published_sweep_trains_what_is_published(data):
    "Every seed of every recipe in force is a run of `results/published.yaml`, with the same parameters of data and training"
    jobs = {(f"{j.values['dataset']}-{j.values['arch']}", f"seed{j.values['seed']}"): j.values for j in read_sweep(RESULTS/"published.yaml").jobs}
    published = {(f.parent.name, f.name): rs.recipe_of(Run(f, verify=False)) for f in SEEDS if not is_variant(f.parent.name)}
    assert set(jobs) == set(published)
    for name, recipe in published.items(): assert {k: jobs[name][k] for k in recipe} == recipe, name


@pytest.mark.parametrize("name", ["pneumoniamnist", "chest_xray", "nih_chestxray14"])
def test_datasheets_are_those_of_the_data_at_hand(name, data, tmp_path):
    write_audit(name, tmp_path)
    assert (tmp_path/"datasheet.md").read_text() == (RESULTS/f"datasheets/{name}.md").read_text()


def test_a_published_calibration_follows_from_the_validation_rows():
    "The newest experiment's first seed: the same calibrator and thresholds from predictions.csv alone"
    folder = next(f for f in SEEDS if (f/"calibration.json").is_file())
    said, table = json.loads((folder/"calibration.json").read_text()), rs.read_predictions(folder/"predictions.csv")
    found = fit_calibration(table[table.split == "val"], seed=Run(folder, verify=False).manifest["parameters"]["seed"], replicates=2)[0].to_dict()
    assert found["calibrator"]["kind"] == said["calibrator"]["kind"]
    assert [p["threshold"] for p in found["operating_points"]] == pytest.approx([p["threshold"] for p in said["operating_points"]], abs=1e-9)


def test_goals_are_met_or_missed_as_the_figures_say(committed):
    shown = rs.goal_table(committed)
    for said, r in zip(shown.to_dict("records"), rs.heads(committed).to_dict("records")):
        truth = dict(floor=r["auc"] >= .989 and r["accuracy"] >= .916, goal=r["auc"] >= .991 and r["accuracy"] >= .946, beyond=r["auc"] >= .995 and r["accuracy"] >= .958,
                     threshold=r["sensitivity_promised"] >= .95 and r["specificity_promised"] > .81, ece=r["ece_calibrated"] <= .05, brier=r["brier_calibrated"] < .08)
        for goal, ok in truth.items(): assert said[rs.HEADINGS[goal]].startswith("met" if ok else "missed"), (r["experiment"], r["who"], goal)


def test_the_ensemble_rule_uses_each_members_own_validation():
    "Thresholds and calibrators are the members'; where the seeds drew other validation patients, no row of one seed's validation decides for another"
    for name, runs in rs.experiments().items():
        if len(runs) < 2: continue
        parts = {seed: rs.judged(run) for seed, run in runs.items()}
        assert rs.joined(parts)[2] == pytest.approx(np.mean([t for *_, t in parts.values()]))
        expected = np.mean([1/(1 + np.exp(-after.sort_values("image_id").logit.to_numpy())) for _, after, _ in parts.values()], axis=0)
        np.testing.assert_allclose(1/(1 + np.exp(-rs.joined(parts)[1].logit)), expected, atol=1e-9)
        return
    pytest.skip("no experiment has two seeds")


def test_every_figure_of_others_has_its_source_and_its_protocol():
    table = rs.read_literature()
    assert len(table) > 25 and {"validation", "test", "not stated"} <= set(table.chosen_on)
    assert table.reference.str.match(r"https://(doi\.org/10\.|github\.com/)|its own report").all() and table.differs.notna().all()
    assert not table.duplicated(["source", "model", "input"]).any()
    for m in ("auc", "accuracy"): assert table[m].dropna().between(.5, 1).all()
    assert (table.auc.isna() | table.auc_lower.isna() | ((table.auc_lower < table.auc) & (table.auc < table.auc_upper))).all()
    assert (table[table.source.str.startswith("MedViTV2")].chosen_on == "test").all()


@pytest.fixture
def copy(tmp_path):
    "The first two seeds of a published experiment as if they were the only ones"
    first = next(f.parent for f in SEEDS if (f/"calibration.json").is_file())
    for seed in sorted(first.glob("seed*"))[:2]: shutil.copytree(seed, tmp_path/"results"/first.name/seed.name)
    return tmp_path/"results"


def test_another_prediction_gives_another_summary_or_none(copy):
    "A changed logit is refused; so is a seed of another recipe"
    file = next(copy.glob("*/seed0/predictions.csv"))
    text = file.read_text()
    file.write_text(text.replace(",0,", ",1,", 1))
    with pytest.raises(ManifestMismatch, match="predictions.csv"): rs.summary_table(copy)
    file.write_text(text)
    seed = file.parent.with_name("seed7")
    shutil.copytree(file.parent, seed)
    manifest = json.loads((seed/"manifest.json").read_text())
    manifest["stages"]["04_training"]["parameters"]["augment"] = "none"
    (seed/"manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StudyError, match="differ in augment"): rs.summary_table(copy)


def test_publishing_that_is_interrupted_is_noticed(copy, tmp_path, monkeypatch):
    "The manifest is written last: files of two runs do not pass for one"
    old, new = next(copy.glob("*/seed0")), tmp_path/"run"
    shutil.copytree(old, new)
    run = Run(new, verify=False)
    (new/"predictions.csv").write_text((new/"predictions.csv").read_text().replace(",0,", ",1,", 1))
    run.manifest["artefacts"] = {n: dict(sha256=rs.sha256(new/n), stage=a["stage"]) for n, a in run.manifest["artefacts"].items() if n in rs.PUBLISHED}
    (new/"report.html").write_text("<html></html>")
    run.manifest["artefacts"]["report.html"] = dict(sha256=rs.sha256(new/"report.html"), stage="report")
    run.save_manifest()
    real, done = shutil.copyfile, []

    def fails(source, target):
        done.append(Path(source).name)
        if done[-1] == "model.json": raise OSError(28, "No space left on device")
        return real(source, target)
    monkeypatch.setattr(shutil, "copyfile", fails)
    with pytest.raises(StudyError, match="disk is full"): rs.publish(new, copy)
    with pytest.raises(ManifestMismatch, match="predictions.csv"): rs.check_published(old)
    monkeypatch.setattr(shutil, "copyfile", real)
    assert rs.check_published(rs.publish(new, copy)).folder == old


def test_synthetic_and_unfinished_runs_are_not_published(tmp_path):
    run = Run(tmp_path/"run").begin("02_data", seed=0)
    run.finish(synthetic=True)
    with pytest.raises(StudyError, match="is not finished, it has no predictions.csv"): rs.publish(tmp_path/"run", tmp_path/"results")
    assert not (tmp_path/"results").exists()


def test_the_page_needs_no_torch():
    code = "import sys, cxr_study.results as r; r.literature_figure(r.read_literature(), r.read_summary()); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
