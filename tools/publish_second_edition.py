"""Make the published run of a network of the second edition whose weights are in the repository.

    python tools/publish_second_edition.py results/second_edition/chest_xray-tf_efficientnetv2_b0/seed0

The folder holds `model.safetensors`, large tensors in half precision. Training, calibrator and threshold are those of
`results/second_edition/call*` and ANALYSIS_PLAN.md; logits are computed again on the CPU in float32. Needs CXR_DATA
with chest_xray and nih_chestxray14. Make the bundle afterwards: `cxr-study bundle FOLDER --out models/NAME`.
"""

import argparse
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import papermill

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from second_edition_films import VERSIONS, WIDE
from second_edition_findings import Network, threshold_in_use
from second_edition_tables import films_of, read

from cxr_study.calibrate.conformal import coverage, fit_sets
from cxr_study.calibrate.measures import calibration_measures
from cxr_study.calibrate.thresholds import operating_points, point_metrics
from cxr_study.calibrate.transfer import calibrated, validation_to_test
from cxr_study.core.options import defaults
from cxr_study.core.run import Run, atomic_write, root
from cxr_study.data.splits import open_data
from cxr_study.pipeline.published import PUBLISHED_FILES
from cxr_study.pipeline.stages import RunSettings, run_stages
from cxr_study.predict.decision import Calibration, Calibrator, OperatingPoint, sigmoid
from cxr_study.robust.other_hospital import external
from cxr_study.train.networks import load_model
from cxr_study.train.training import predict_table

EDITION = root() / "results/second_edition"
COMMIT = "40dd74c19735bcdc490934b71fb52fcf0c94186c"  # Whose code trained the networks
POINT = "wide_and_other_0.97"
RULE = (
    "largest sensitivity + specificity on validation, wide and other normal films with equal weight, "
    "among thresholds with a sensitivity of at least 0.97"
)
CALIBRATOR_NOTE = (
    "It was fitted on the validation films in seven versions each: as they are, darker, brighter, flatter, "
    "steeper, narrower and wider (`ANALYSIS_PLAN.md`, section 5)."
)
POINT_NOTE = (
    f"`{POINT}` is not among the values that were dealt out at random. It is called not reproduced if the whole "
    "interval on the test is worse than the validation value."
)
WEIGHTS_NOTE = (
    "Weights were stored in half precision after the training, but for small tensors. The predictions here were "
    "computed with the stored weights on a CPU in float32."
)
CHOICE = (
    "This network was named as the one to ship when its figures on this test were known. The plan's own rule ships a "
    "network whose weights are lost (`ANALYSIS_PLAN.md`, section 9)."
)
ELSEWHERE = "nih_chestxray14"  # The other hospital
FILES = (
    *PUBLISHED_FILES,
    "model.safetensors",
    "split.csv",
    "data.json",
    "audit.json",
    "familiarity.json",
    "subgroups.json",
    f"external-{ELSEWHERE}.json",
    f"external-{ELSEWHERE}.csv",
)
REPLICATES = 1000
LATER = ("04_calibration", "06_robustness")


def network_of(folder: Path) -> Network:
    "The training with the weights in `folder`, with the logits that the GPU (or, for later seeds, a CPU) gave"
    facts, logits = read(*sorted(EDITION.glob("call*")))
    data, _, arch = folder.parent.name.partition("-")
    is_distilled = arch.endswith("-distilled")
    part = "distil" if is_distilled else "seeds"
    wanted = dict(part=part, data=data, arch=arch.removesuffix("-distilled"))
    wanted["seed"] = int(folder.name.removeprefix("seed"))
    jobs = [job for job in facts["jobs"] if wanted.items() <= job["job"].items()]
    films = films_of(facts, data)
    films = films.assign(wide=films.ratio >= WIDE)
    network = Network(data, jobs, logits, films)
    network.facts = facts
    return network


# --- Stages


def training_options(job: dict) -> dict:
    "The options of 02_training, as far as they describe this training"
    given = {name: job[name] for name in ("arch", "weights", "lr", "augment", "ema", "seed")}
    options = defaults("02_training") | given | dict(epochs=job["epochs"])
    del options["validate"]  # The seven versions in turn, which no option gives
    return options


def enter_training(run: Run, folder: Path, network: Network) -> None:
    "Stage 02_training: weights and history of the GPU, predictions of this machine"
    (entry,) = network.jobs
    job = entry["job"]
    options = training_options(job)
    run.begin("02_training", **options)
    history = pd.DataFrame(entry["history"])
    run.write("history.csv", history)
    shutil.copyfile(folder / "model.safetensors", run.path("model.safetensors"))
    run.add("model.safetensors")
    model_facts = dict(
        arch=job["arch"],
        weights=job["weights"],
        best_epoch=[int(history.epoch[history.valid_loss.idxmin()])],
        seed=job["seed"],
        dropout=options["dropout"],
        members=1,
    )
    run.write("model.json", model_facts)
    model = load_model(run)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    run.write("model.json", model_facts | dict(parameters=parameters))
    images, table = open_data(run)
    predictions = predict_table(model, images, table)
    run.write("predictions.csv", predictions)
    run.finish(seed=job["seed"], training=training_facts(network, predictions))
    run.manifest["stages"]["02_training"] |= dict(
        git=dict(commit=COMMIT, dirty=False),
        hardware=network.facts["hardware"],
        versions=network.facts["versions"],
        seconds=entry["seconds"]["train"],
        finished="2026-11-26T18:48:00+00:00",
    )
    run.save_manifest()


def training_facts(network: Network, predictions: pd.DataFrame) -> dict:
    "What the manifest says of the training beside its options"
    (entry,) = network.jobs
    job = entry["job"]
    teachers = [f"{t['job']['arch']}, seed {t['job']['seed']}" for t in job["teachers"]]
    return dict(
        key=entry["key"],
        recipe=job["name"],
        epoch_chosen_by="log loss on validation films, each in one of seven versions in turn",
        criterion_c=entry["criterion"],
        valid_auc=entry["valid_auc"],
        teachers=teachers,
        choice=CHOICE,
        weights=WEIGHTS_NOTE,
        from_gpu=differences(network, predictions),
    )


def differences(network: Network, predictions: pd.DataFrame) -> dict:
    "Split -> largest difference of a logit from the GPU's, and decisions in use that differ"
    slope, intercept = network.line(0)
    threshold = network.threshold(0)
    parts = dict(val=(network.val(0), "val/plain"), test=(network.test, "test/1"))
    found = {}
    for split, (films, name) in parts.items():
        here = predictions[predictions.split == split].set_index("image_id").logit
        here = here.loc[films.image_id].to_numpy()
        there = network.raw(0, name)
        before, after = (slope * z + intercept >= threshold for z in (there, here))
        found[split] = dict(
            films=len(films),
            largest_difference=float(np.abs(here - there).max()),
            changed_decisions=int((before != after).sum()),
        )
    return found


def run_notebook(run: Run, stage: str) -> None:
    "A stage as it is"
    options = dict(run_dir=str(run.folder))
    papermill.execute_notebook(root() / f"nbs/{stage}.ipynb", None, options, progress_bar=False)


# --- Calibration


def plan_calibration(network: Network, val: pd.DataFrame) -> Calibration:
    "Calibrator and threshold of the plan; the study's other operating points beside it"
    slope, intercept = network.line(0)
    calibrator = Calibrator("platt", dict(slope=slope, intercept=intercept))
    after = val.assign(logit=calibrator(val.logit))
    threshold = float(sigmoid(threshold_in_use(network.calibrated(0, "val/plain"), network.val(0))))
    in_use = OperatingPoint(POINT, threshold, RULE, "validation")
    in_use = replace(in_use, promised=point_metrics(after, in_use, None, REPLICATES))
    points = (*operating_points(after, replicates=REPLICATES), in_use)
    prevalence = float(val.label.mean())
    return Calibration(calibrator, points, POINT, fit_sets(val, 0.05), prevalence)


def compared(rows: list[dict]) -> list[dict]:  # From `validation_to_test`
    "The rows; those of the point in use without chances, so that their intervals decide"
    chances = ("p", "p_corrected", "independent", "worse")
    found = []
    for row in rows:
        if row["point"] == POINT:
            row = {name: value for name, value in row.items() if name not in chances}
        found.append(row)
    return found


def enter_calibration(run: Run, network: Network) -> None:
    "Stage 04_calibration, by the rules of the plan"
    predictions = run.read("predictions.csv")
    val = predictions[predictions.split == "val"]
    test = predictions[predictions.split == "test"]
    options = defaults("04_calibration") | dict(calibrator="platt", operating_point=POINT)
    run.begin("04_calibration", keep=LATER, **options)
    calibration = plan_calibration(network, val)
    seed, cost = options["seed"], options["cost_of_miss"]
    versions = {"test, before": test, "test, platt": calibrated(test, calibration)}
    measures = {
        name: calibration_measures(table, None, REPLICATES, seed)
        for name, table in versions.items()
    }
    fitted_on = dict(
        images=len(val),
        patients=val.patient_id.nunique(),
        pneumonia=int(val.label.sum()),
        versions=list(VERSIONS),
    )
    details = dict(
        fitted_on=fitted_on,
        comparison=[],
        promised_and_got=compared(
            validation_to_test(calibration, predictions, "test", cost, REPLICATES, seed)
        ),
        measures=measures,
        coverage={
            name: coverage(calibration.conformal, predictions, name) for name in ("val", "test")
        },
        notes=[CALIBRATOR_NOTE, POINT_NOTE],
    )
    run.write("calibration.json", calibration.to_dict() | details)
    run.finish()


# --- The published folder


def publish(run: Run, folder: Path) -> None:
    "Copy the published files; the manifest names these alone"
    kept = {}
    for name in FILES:
        if name in run.manifest["artefacts"]:
            kept[name] = run.manifest["artefacts"][name]
            with atomic_write(folder / name) as file:
                shutil.copyfile(run.path(name), file)
    published = Run(folder, verify=False)
    published.manifest = run.manifest | dict(artefacts=kept)
    published.save_manifest()
    Run(folder)


def make_run(folder: Path, place: Path) -> None:
    "Make the run in `place` and publish it in `folder`"
    network = network_of(folder)
    job = network.jobs[0]["job"]
    given = dict(dataset=job["data"], size=job["size"])
    place = place / f"second_edition-{folder.parent.name}-{folder.name}"
    if "01_data" not in Run(place).stages:
        run_stages(place, given, settings=RunSettings(only=frozenset({"01_data"})))
    if "02_training" not in Run(place).stages:
        enter_training(Run(place), folder, network)
    if "03_evaluation" not in Run(place).stages:
        run_notebook(Run(place), "03_evaluation")
    if "04_calibration" not in Run(place).stages:
        enter_calibration(Run(place), network)
    if "06_robustness" not in Run(place).stages:
        run_notebook(Run(place), "06_robustness")
    if f"external-{ELSEWHERE}.json" not in Run(place).manifest["artefacts"]:
        external(place, ELSEWHERE, replicates=REPLICATES)
    publish(Run(place), folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--runs", type=Path, help="where the run is kept; one that was interrupted goes on"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        make_run(options.folder.resolve(), options.runs or Path(temporary))


if __name__ == "__main__":
    main()
