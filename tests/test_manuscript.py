"""The study as a Quarto manuscript: everything that its configuration and its texts name is in the folder."""

import re

import manuscript
import nbformat
import pytest
from ruamel.yaml import YAML


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return manuscript.write_manuscript(tmp_path_factory.mktemp("m") / "manuscript")


def test_the_configuration_names_files_that_are_there(folder):
    configuration = YAML(typ="safe").load(folder / "_quarto.yml")
    assert configuration["project"]["type"] == "manuscript"
    assert configuration["execute"] == {"enabled": False}
    assert {"html", "pdf"} <= set(configuration["format"])
    assert (folder / configuration["manuscript"]["article"]).is_file()
    notebooks = [entry["notebook"] for entry in configuration["manuscript"]["notebooks"]]
    assert notebooks == [path.name for path in manuscript.pages()]
    assert all((folder / name).is_file() for name in notebooks)


def test_each_link_of_the_manuscript_leads_somewhere(folder):
    for path in folder.glob("*.ipynb"):
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type != "markdown":
                continue
            assert "<!--q" not in cell.source
            for address in re.findall(r"\]\(([^)\s]+)\)", cell.source):
                local = not address.startswith(("http", "#", "mailto:"))
                assert not local or (folder / address).is_file(), (path.name, address)
                if address.startswith(manuscript.SITE):
                    page = address.removeprefix(manuscript.SITE).partition("#")[0]
                    source = manuscript.root() / "nbs" / page
                    assert source.exists() or source.with_suffix(".ipynb").exists(), address


def test_the_article_has_tables_figures_and_their_data(folder):
    cells = nbformat.read(folder / "index.ipynb", 4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    tables = [
        output for output in outputs if "<table" in output.get("data", {}).get("text/html", "")
    ]
    assert len(figures) > 8 and tables
    data = {path.relative_to(folder / "data") for path in (folder / "data").rglob("*.*")}
    assert len(data) > 10
    for path in data:
        copied = (folder / "data" / path).read_bytes()
        assert copied == (manuscript.root() / "results" / path).read_bytes()
    total = sum(path.stat().st_size for path in folder.rglob("*.*") if path.is_file())
    assert total < 30e6
