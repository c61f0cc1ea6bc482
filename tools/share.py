"""Describe data sets and published runs for machines.

    python tools/share.py [croissant] [crates] [sbom]

croissant  results/croissant/<data set>.json (Croissant 1.0): the splits and, for PneumoniaMNIST, the matching films.
           Its split is drawn anew if CXR_DATA has the images; otherwise the table that is there stays.
crates     ro-crate-metadata.json (RO-Crate 1.1, Process Run Crate) in each folder of a published run
sbom       sbom/<lock>.json (CycloneDX) of each file of locked requirements; not committed, a release brings it

Without an argument it does all three. Needs `pip install -e '.[share]'`.
"""

import argparse
import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pandas as pd

from cxr_study.core.run import StudyError, atomic_write, root, sha256

REPOSITORY = "https://github.com/cxr-study/cxr_study"
CC_BY = "https://creativecommons.org/licenses/by/4.0/"
APACHE = "https://spdx.org/licenses/Apache-2.0"

# --- Croissant

_DESCRIBED = dict(
    image_id="Name of the image: its path in the publisher's folder, or split and number in the publisher's arrays",
    patient_id="The patient; an image whose patient is unknown is its own",
    label="0: normal, 1: pneumonia",
    subtype="bacteria, virus or normal",
    image_hash="Beginning of the SHA-256 of the decoded image; equal for identical images",
    age="Years",
    sex="M or F",
    view="PA or AP",
    finding_labels="The publisher's findings",
    official="The publisher's split",
    excluded="Why the image is in no split",
    file="The film in Kaggle's folder that the image was made from; a film without an image_id has no image",
    ratio="Width over height of that film",
    correlation="Correlation of the image with that film",
    margin="By how much the next best film correlates less",
)

DATA_SETS = dict(
    chest_xray=dict(
        description="Chest radiographs of children with the labels normal and pneumonia (Kermany et al. 2018), as they "
        "lie in Kaggle's 'Chest X-Ray Images (Pneumonia)', with a split by patient.",
        url="https://doi.org/10.17632/rscbjbr9sj",
        cite="Kermany D, Zhang K, Goldbaum M. Large Dataset of Labeled Optical Coherence Tomography (OCT) and Chest "
        "X-Ray Images. Mendeley Data, 2018. doi:10.17632/rscbjbr9sj.3",
        licence=CC_BY,
        tables=dict(
            images="results/second_edition/chest_xray-tf_efficientnetv2_b0/seed0/split.csv"
        ),
    ),
    pneumoniamnist=dict(
        description="Small copies of Kermany's radiographs (MedMNIST v2, Yang et al. 2023), with a split by child "
        "without identical images, and the film of each image where it is known.",
        url="https://zenodo.org/records/10519652",
        cite="Yang J et al. MedMNIST v2 - A large-scale lightweight benchmark for 2D and 3D biomedical image "
        "classification. Scientific Data 10:41, 2023. doi:10.1038/s41597-022-01721-8",
        licence=CC_BY,
        tables=dict(
            images="results/croissant/pneumoniamnist_split.csv",
            matches="cxr_study/data/pneumoniamnist_matches.csv",
        ),
    ),
    nih_chestxray14=dict(
        description="The images of adults from NIH ChestX-ray14 (Wang et al. 2017) that stand for another hospital, "
        "with and without pneumonia. Nothing is trained or chosen on them.",
        url="https://nihcc.app.box.com/v/ChestXray-NIHCC",
        cite="Wang X et al. ChestX-ray8: Hospital-scale chest X-ray database and benchmarks on weakly-supervised "
        "classification and localization of common thorax diseases. CVPR 2017",
        licence="https://nihcc.app.box.com/v/ChestXray-NIHCC",
        tables=dict(images="results/external/chest_xray-resnet18-seed0-nih_chestxray14.csv"),
    ),
)


def _field(mlc, table: str, name: str, values: pd.Series):
    "One column as a Croissant field"
    kinds = dict(i=mlc.DataType.INTEGER, f=mlc.DataType.FLOAT)
    kind = [kinds.get(values.dtype.kind, mlc.DataType.TEXT)]
    references = None
    if name == "split":
        kind = [mlc.DataType.SPLIT, mlc.DataType.TEXT]
        references = mlc.Source(field="splits/name")
    source = mlc.Source(file_object=f"{table}.csv", extract=mlc.Extract(column=name))
    return mlc.Field(
        id=f"{table}/{name}",
        name=name,
        description=_DESCRIBED.get(name, name),
        data_types=kind,
        source=source,
        references=references,
    )


def _splits(mlc, names: list[str]):
    "The record set that names the splits, as Croissant wants it"
    uris = dict(train="TrainingSplit", val="ValidationSplit", test="TestSplit")
    fields = [
        mlc.Field(id="splits/name", name="name", data_types=[mlc.DataType.TEXT]),
        mlc.Field(id="splits/url", name="url", data_types=[mlc.DataType.URL]),
    ]
    data = [{"splits/name": n, "splits/url": f"cr:{uris[n]}"} for n in names]
    return mlc.RecordSet(
        id="splits",
        name="splits",
        key=["splits/name"],
        data_types=[mlc.DataType.SPLIT],
        fields=fields,
        data=data,
    )


_NOT_OF_THE_DATA = ("logit", "row")  # Columns that a network or a cache added


def croissant(name: str, folder: Path) -> dict:
    "The Croissant description of a data set, with paths as seen from `folder`. Raises `mlcroissant.ValidationError`"
    import mlcroissant as mlc

    facts = DATA_SETS[name]
    files, sets = [], []
    for table, place in facts["tables"].items():
        path = root() / place
        rows = pd.read_csv(path)
        relative = Path(os.path.relpath(path, folder)).as_posix()
        files.append(
            mlc.FileObject(
                id=f"{table}.csv",
                name=f"{table}.csv",
                content_url=relative,
                encoding_formats=["text/csv"],
                sha256=sha256(path),
            )
        )
        columns = [c for c in rows if c not in _NOT_OF_THE_DATA]
        if "split" in columns:
            order = [n for n in ("train", "val", "test") if n in set(rows.split)]
            sets.append(_splits(mlc, order))
        fields = [_field(mlc, table, column, rows[column]) for column in columns]
        identified = rows.image_id.notna().all() and rows.image_id.is_unique
        key = [f"{table}/image_id"] if identified else None
        sets.append(mlc.RecordSet(id=table, name=table, key=key, fields=fields))
    sheet = root() / f"results/datasheets/{name}.md"
    described = mlc.Metadata(
        name=name,
        description=f"{facts['description']} The images stay where their publisher offers them. "
        f"Datasheet: {os.path.relpath(sheet, folder)}",
        url=facts["url"],
        license=[facts["licence"]],
        cite_as=facts["cite"],
        version="1.0.0",
        distribution=files,
        record_sets=sets,
    )
    return described.to_json()


def _pneumoniamnist_split(path: Path) -> bool:
    "Write the default split of PneumoniaMNIST; False if its images are not at hand"
    from cxr_study.data.cache import decoded
    from cxr_study.data.images import Preprocess
    from cxr_study.data.sets import MissingData, load_dataset
    from cxr_study.data.splits import make_split

    if not os.environ.get("CXR_DATA"):
        return False
    try:
        image_set = load_dataset("pneumoniamnist")
    except MissingData:
        return False
    _, index, _ = decoded(image_set, Preprocess(64))
    table, _ = make_split(image_set, index.sha256)
    with atomic_write(path) as temporary:
        table.drop(columns="row").to_csv(temporary, index=False)
    return True


def write_croissant() -> list[Path]:
    "Write the description of every data set; returns the files"
    folder = root() / "results/croissant"
    _pneumoniamnist_split(folder / "pneumoniamnist_split.csv")
    written = []
    for name in DATA_SETS:
        text = json.dumps(croissant(name, folder), indent=1, default=str, ensure_ascii=False)
        with atomic_write(folder / f"{name}.json") as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        written.append(folder / f"{name}.json")
    return written


# --- RO-Crate

_FILES = {
    "manifest.json": "Options, stages, versions and machine of the run, and the SHA-256 of its files",
    "predictions.csv": "Logit of the network for each image of validation and test",
    "metrics.json": "Metrics with intervals that draw patients",
    "calibration.json": "Calibrators, operating points and prediction sets",
    "preprocess.json": "From an image to the network's input",
    "history.csv": "Loss and AUC by epoch",
    "model.json": "Architecture of the network",
    "model.safetensors": "Weights of the network",
    "split.csv": "Split of the images by patient",
    "data.json": "The data set and its checksums",
    "errors.csv": "Test images that the network got wrong",
    "familiarity.json": "What tells unfamiliar images from the training images",
    "subgroups.json": "Error rates by subgroup",
    "audit.json": "Duplicates, leaks, shift and shortcuts of the data set",
}
_FORMATS = {".json": "application/json", ".csv": "text/csv"}
_PROFILE = "https://w3id.org/ro/wfrun/process/0.5"


def crates() -> list[Path]:
    "Folders of the published runs"
    return sorted(path.parent for path in (root() / "results").glob("**/seed*/manifest.json"))


def write_crate(folder: Path) -> Path:
    "Write the RO-Crate description of a published run into its folder; returns the file"
    from rocrate.model import ContextEntity
    from rocrate.rocrate import ROCrate

    manifest = json.loads((folder / "manifest.json").read_text())
    stages = list(manifest["stages"].values())
    finished = max(stage["finished"] for stage in stages)
    data = manifest["data"]["dataset"]
    arch = manifest["parameters"]["arch"]
    crate = ROCrate(version="1.1")
    crate.name = f"{arch} on {data}, seed {manifest['parameters']['seed']}"
    crate.description = "Predictions, metrics and provenance of a network that looks for pneumonia on chest radiographs"
    crate.datePublished = datetime.fromisoformat(finished)

    def add(identifier, kind, **properties):
        properties = {"@type": kind, **properties}
        return crate.add(ContextEntity(crate, identifier, properties=properties))

    licence = add(APACHE, "CreativeWork", name="Apache License 2.0")
    authors = add("#authors", "Organization", name="The cxr_study authors", url=REPOSITORY)
    profile = add(_PROFILE, "CreativeWork", name="Process Run Crate", version="0.5")
    crate.license = licence
    crate.root_dataset["author"] = authors
    crate.publisher = authors
    crate.root_dataset["conformsTo"] = profile
    crate.root_dataset["mainEntityOfPage"] = REPOSITORY
    files = []
    for path in sorted(folder.iterdir()):
        if path.name == "ro-crate-metadata.json":
            continue
        format_ = _FORMATS.get(path.suffix, "application/octet-stream")
        properties = dict(
            name=path.name,
            description=_FILES.get(path.name, f"{path.stem} of the run"),
            encodingFormat=format_,
            contentSize=str(path.stat().st_size),
        )
        files.append(crate.add_file(path, path.name, properties=properties))
    used = DATA_SETS[data]
    source = add(used["url"], "CreativeWork", name=data, description=used["description"])
    source["license"] = used["licence"]
    software = add(
        f"{REPOSITORY}/tree/{stages[-1]['git']['commit']}",
        "SoftwareApplication",
        name="cxr-study",
        url=REPOSITORY,
        softwareVersion=f"{manifest['versions']['cxr-study']}, commit {stages[-1]['git']['commit']}",
    )
    action = crate.add_action(
        software,
        identifier=f"#{manifest['run']}",
        object=source,
        result=files,
        properties=dict(
            name=f"cxr-study run --dataset {data} --arch {arch}",
            description="All stages of the run; manifest.json holds their options",
            endTime=finished,
            agent={"@id": "#authors"},
        ),
    )
    crate.root_dataset["mentions"] = action
    target = folder / "ro-crate-metadata.json"
    with atomic_write(target) as temporary:
        text = json.dumps(crate.metadata.generate(), indent=1, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    return target


# --- CycloneDX

LOCKS = ("requirements.lock", "requirements-serve.lock", "requirements-evaluate.lock")


def write_sbom(lock: str, folder: Path) -> Path:
    "Write the validated CycloneDX list of a file of locked requirements; returns the file"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{Path(lock).stem}.json"
    command = [sys.executable, "-m", "cyclonedx_py", "requirements", str(root() / lock)]
    options = ["--pyproject", str(root() / "pyproject.toml"), "--output-reproducible"]
    done = subprocess.run(
        [*command, *options, "--validate", "--of", "JSON", "-o", str(target)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise StudyError(f"No list of {lock} could be made: {done.stderr.strip()}")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", choices=["croissant", "crates", "sbom", []])
    what = parser.parse_args().what or ["croissant", "crates", "sbom"]
    try:
        if "croissant" in what:
            print(*write_croissant(), sep="\n")
        if "crates" in what:
            print(len([write_crate(folder) for folder in crates()]), "crates")
        if "sbom" in what:
            print(*[write_sbom(lock, root() / "sbom") for lock in LOCKS], sep="\n")
    except ModuleNotFoundError as error:
        sys.exit(f"Error: {error.name} is not installed: pip install -e '.[share]'")
    except StudyError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
