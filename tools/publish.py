"""Copy what is published of a finished run to results/<experiment>/seed<k>.

    python tools/publish.py runs/RUN [--name EXPERIMENT] [--outputs]

`--outputs` also gives the stage notebooks in nbs/ the outputs that they had in this run. Afterwards write the summary
anew with `python tools/write_summary.py`.
"""

import argparse
import base64
import io
import shutil
import sys
from pathlib import Path

import nbformat
from PIL import Image

from cxr_study.core.run import Run, StudyError, atomic_write, root
from cxr_study.pipeline.published import PUBLISHED_FILES, check_published, experiment_of


def publishable(run_folder: str | Path) -> Run:
    "The run, every file of it verified; `StudyError` if it is not finished, or not of real radiographs"
    run = Run(run_folder)
    lacking = [
        name for name in (*PUBLISHED_FILES, "report.html") if name not in run.manifest["artefacts"]
    ]
    if lacking:
        raise StudyError(
            f"{run.folder} is not finished, it has no {', '.join(lacking)}: "
            "`cxr-study run` with the same options continues it."
        )
    if run.manifest["synthetic"] is not False:
        raise StudyError(
            f"{run.folder} is made of drawn images, or does not say that it is not: "
            "only runs of real radiographs are published."
        )
    return run


def publish(run_folder: str | Path, results: Path | None = None, name: str | None = None) -> Path:
    """Copy a finished run to `results/<name>/seed<k>`, the manifest last; returns that folder.

    `name` is that of the experiment: data set and network if it is None."""
    run = publishable(run_folder)
    experiment, seed = experiment_of(run)
    folder = Path(results or root() / "results") / (name or experiment) / seed
    for file in (*PUBLISHED_FILES, "manifest.json"):
        with atomic_write(folder / file) as temporary:
            shutil.copyfile(run.path(file), temporary)
    return check_published(folder).folder


def light_png(text: str, colours: int = 64) -> str:
    "The same picture (Base64, as in a notebook's output) with a palette, if that is smaller"
    picture = Image.open(io.BytesIO(base64.b64decode(text)))
    if picture.mode == "P":
        return text
    lighter = io.BytesIO()
    picture.convert("RGB").quantize(colours).save(lighter, "png", optimize=True)
    return min(text, base64.b64encode(lighter.getvalue()).decode(), key=len)


def lighten(path: str | Path) -> None:
    "Give every picture in the outputs of a notebook a palette, so that the notebook stays under 300 kB"
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = light_png(output.data["image/png"])
    with atomic_write(path) as file:
        nbformat.write(notebook, file)


def publish_outputs(run_folder: str | Path, folder: Path | None = None) -> list[str]:
    """Give the cells of the stages the outputs that they had in this run; returns the names of the notebooks.

    `StudyError` if the code of a cell has changed since, because it would show an output that it does not give."""
    run, names = Run(run_folder, verify=False), []
    for path in sorted((run.folder / "notebooks").glob("*.ipynb")):
        made = {cell.id: cell for cell in nbformat.read(path, 4).cells}
        target = Path(folder or root() / "nbs") / path.name
        notebook = nbformat.read(target, 4)
        tagged = ["parameters" in cell.metadata.get("tags", []) for cell in notebook.cells]
        for cell in notebook.cells[tagged.index(True) + 1 :]:
            if cell.cell_type != "code":
                continue
            if cell.id not in made or made[cell.id].source != cell.source:
                raise StudyError(
                    f"{path.stem} has changed since {run.folder.name} ran it. Run it again first."
                )
            cell.outputs = made[cell.id].outputs
        with atomic_write(target) as file:
            nbformat.write(notebook, file)
        lighten(target)
        names.append(path.stem)
    return names


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--name", help="of the experiment, if it is not data set and network")
    parser.add_argument(
        "--outputs", action="store_true", help="also copy the outputs of the stage notebooks"
    )
    asked = parser.parse_args()
    try:
        print(publish(asked.run, name=asked.name))
        if asked.outputs:
            print("Outputs of", ", ".join(publish_outputs(asked.run)))
    except StudyError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
