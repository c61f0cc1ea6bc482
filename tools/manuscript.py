"""Gather the study as a Quarto manuscript: a folder that `quarto render` turns into HTML, and PDF where TeX is at hand.

    python tools/manuscript.py FOLDER

The article is `nbs/howto/study.ipynb` with its tables, followed by one figure of each page of results. These pages
are the supplement, with all figures. `data` holds the files that the figures are drawn from. Nothing is executed:
the outputs are those in the repository.
"""

import argparse
import copy
import re
import shutil
from pathlib import Path

import nbformat

from cxr_study.core.run import root

SITE = "https://cxr-study.github.io/cxr_study/"
CONFIGURATION = """\
project:
  type: manuscript
  output-dir: _manuscript

manuscript:
  article: index.ipynb
  manuscript-url: {site}
  notebooks:
{notebooks}
  resources: ["data/**"]

execute:
  enabled: false

format:
  html:
    theme: cosmo
    highlight-style: a11y
    toc: true
    number-sections: true
    code-overflow: wrap
  pdf:
    toc: true
    number-sections: true
"""
_DATA = re.compile(r"[\w.-]+\.(?:csv|json|npz)\b")
_LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)\s]+)\)")
_MARK = re.compile(r"<!--/?q.*?-->", re.DOTALL)


def pages() -> list[Path]:
    "The pages of results, in reading order"
    return sorted((root() / "nbs/results").glob("*.ipynb"))


def title_of(notebook: nbformat.NotebookNode) -> str:
    return notebook.cells[0].source.splitlines()[0].removeprefix("# ")


def data_of(notebook: nbformat.NotebookNode) -> list[Path]:
    "Files in `results/` that the code of a page names, without those of single runs"
    source = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    names = set(_DATA.findall(source))
    found = (path for path in (root() / "results").rglob("*") if path.name in names)
    return sorted(path for path in found if not path.parent.name.startswith("seed"))


def _on_the_site(match: re.Match, place: Path) -> str:
    "A relative link of a notebook as an address of the site"
    path, hash_, part = match[1].partition("#")
    target = (place.parent / path).resolve().relative_to(root() / "nbs")
    if target.suffix == ".ipynb":
        target = target.with_suffix(".html")
    return f"]({SITE}{target.as_posix()}{hash_}{part})"


def _for_the_manuscript(path: Path) -> nbformat.NotebookNode:
    "A notebook with links to the site, and without marks of figures"
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _MARK.sub("", cell.source)
            cell.source = _LINK.sub(lambda match: _on_the_site(match, path), cell.source)
    return notebook


def _has_picture(cell: nbformat.NotebookNode) -> bool:
    if cell.cell_type != "code" or "#| fig-alt" not in cell.source:
        return False
    return any("image/png" in output.get("data", {}) for output in cell.outputs)


def _figure_cells(path: Path, notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    "The first figure of a page with its text, the page's link and its data; empty without a figure"
    pictures = [cell for cell in notebook.cells if _has_picture(cell)]
    if not pictures:
        return []
    figure = copy.deepcopy(pictures[0])
    figure.source = f"#| echo: false\n{figure.source}"
    title = title_of(notebook)
    label = f"### {title}\n\nAll figures: [supplement]({path.name})."
    files = [file.relative_to(root() / "results").as_posix() for file in data_of(notebook)]
    links = ", ".join(f"[{name}](data/{name})" for name in files)
    data = f"Data: {links}." if links else "Data: `predictions.csv` of the published runs."
    return [nbformat.v4.new_markdown_cell(f"{label} {data}"), figure]


def write_manuscript(folder: Path) -> Path:
    "Write article, supplement, data and configuration into a new folder; returns it"
    folder.mkdir(parents=True)
    article = _for_the_manuscript(root() / "nbs/howto/study.ipynb")
    article.cells.append(nbformat.v4.new_markdown_cell("## Figures"))
    listed = []
    for path in pages():
        notebook = _for_the_manuscript(path)
        nbformat.write(notebook, folder / path.name)
        article.cells += _figure_cells(path, notebook)
        title = title_of(notebook).replace('"', "'")
        listed.append(
            f'    - notebook: {path.name}\n      title: "Supplement {path.stem[:2]}: {title}"'
        )
        for file in data_of(notebook):
            target = folder / "data" / file.relative_to(root() / "results")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    nbformat.write(article, folder / "index.ipynb")
    text = CONFIGURATION.format(site=SITE, notebooks="\n".join(listed))
    (folder / "_quarto.yml").write_text(text, encoding="utf-8")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="new folder")
    print(write_manuscript(parser.parse_args().folder))


if __name__ == "__main__":
    main()
