"""Copy the published files of a finished run to results/<experiment>/seed<k>.

    python tools/publish.py runs/RUN [--name EXPERIMENT] [--outputs]

With `--outputs` the stage notebooks in nbs/ also get the outputs that they had in this run. Afterwards write the
summary again with `python tools/write_summary.py results`.
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
    "The run, with every file verified; raises `StudyError` if it is unfinished or not of real radiographs"
    run = Run(run_folder)
    needed = (*PUBLISHED_FILES, "report.html")
    missing = [name for name in needed if name not in run.manifest["artefacts"]]
    if missing:
        raise StudyError(
            f"{run.folder} is not finished, it has no {', '.join(missing)}: "
            "`cxr-study run` with the same options continues it."
        )
    if run.manifest["synthetic"] is not False:
        raise StudyError(
            f"{run.folder} uses synthetic images, or its manifest does not say: "
            "only runs of real radiographs are published."
        )
    return run


def publish(
    run_folder: str | Path,
    results: Path | None = None,  # None: the project's `results`
    name: str | None = None,  # Of the experiment; None: data set and network
) -> Path:
    "Copy a finished run to `results/<name>/seed<k>`, with the manifest last; returns that folder"
    run = publishable(run_folder)
    experiment, seed = experiment_of(run)
    folder = Path(results or root() / "results") / (name or experiment) / seed
    for file in (*PUBLISHED_FILES, "manifest.json"):
        with atomic_write(folder / file) as temporary:
            shutil.copyfile(run.path(file), temporary)
    check_published(folder)
    return folder


# --- Outputs of the stage notebooks


def light_png(
    text: str,  # A PNG in Base64, as in a notebook's output
    colours: int = 64,
) -> str:
    "The same image with a palette of so many colours, if that is smaller"
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    if image.mode == "P" and len(image.getcolors()) <= colours:
        return text
    buffer = io.BytesIO()
    image.convert("RGB").quantize(colours).save(buffer, "png", optimize=True)
    lighter = base64.b64encode(buffer.getvalue()).decode()
    return lighter if len(lighter) < len(text) else text


def lighten(path: str | Path) -> None:
    "Give the images in a notebook's outputs a palette, so that the notebook stays under 300 kB"
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = light_png(data["image/png"])
    with atomic_write(path) as file:
        nbformat.write(notebook, file)


def _cells_after_parameters(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    "Code cells that follow the cell tagged `parameters`"
    has_tag = ["parameters" in cell.metadata.get("tags", []) for cell in notebook.cells]
    following = notebook.cells[has_tag.index(True) + 1 :]
    return [cell for cell in following if cell.cell_type == "code"]


def _copy_outputs(executed: nbformat.NotebookNode, notebook: nbformat.NotebookNode) -> bool:
    "Copy the outputs of an executed notebook; False if the code of a cell differs"
    executed_cells = {cell.id: cell for cell in executed.cells}
    for cell in _cells_after_parameters(notebook):
        same = executed_cells.get(cell.id)
        if same is None or same.source != cell.source:
            return False
        cell.outputs = same.outputs
    return True


def publish_outputs(
    run_folder: str | Path,
    folder: Path | None = None,  # Of the stage notebooks; None: the project's `nbs`
) -> list[str]:  # Names of the notebooks
    """Give the stage notebooks the outputs that they had in this run.

    Raises `StudyError` if the code of a cell has changed since, because its output would be wrong."""
    run = Run(run_folder, verify=False)
    folder = Path(folder or root() / "nbs")
    names = []
    for path in sorted((run.folder / "notebooks").glob("*.ipynb")):
        target = folder / path.name
        notebook = nbformat.read(target, 4)
        if not _copy_outputs(nbformat.read(path, 4), notebook):
            raise StudyError(
                f"{path.stem} has changed since {run.folder.name} ran it. Run it again first."
            )
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
    parser.add_argument("--name", help="name of the experiment (default: data set and network)")
    parser.add_argument(
        "--outputs", action="store_true", help="also copy the outputs of the stage notebooks"
    )
    options = parser.parse_args()
    try:
        print(publish(options.run, name=options.name))
        if options.outputs:
            print("Outputs of", ", ".join(publish_outputs(options.run)))
    except StudyError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
