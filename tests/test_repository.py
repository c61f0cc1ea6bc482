"""The tree itself: notebooks, library, README and site belong together."""
import json, re, shutil, subprocess, sys
from pathlib import Path
import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of what git tracks, so that checks that write do not touch the checkout"
    folder = tmp_path_factory.mktemp("copy")
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in names:
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT/name).exists(): shutil.copy2(ROOT/name, folder/name, follow_symlinks=False)
    run = lambda *args: subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *args], cwd=folder, check=True, capture_output=True)
    run("init", "-q"); run("add", "-A"); run("commit", "-qm", "copy")
    return folder


def changes(folder): return subprocess.run(["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True, check=True).stdout


def tool(name): return str(Path(sys.executable).parent/name)


def test_clean_and_export_change_nothing(copy):
    for command in ("nbdev-clean", "nbdev-export"): subprocess.run([tool(command)], cwd=copy, check=True, capture_output=True)
    assert changes(copy) == ""


def test_docs_can_be_built_up_to_quarto(copy):
    code = "from nbdev.serve import proc_nbs; proc_nbs(n_workers=0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((copy/"_proc").glob("*.ipynb"))) == len(list((ROOT/"nbs").glob("*.ipynb")))


def test_readme_is_the_index_notebook(copy):
    subprocess.run([tool("jupyter"), "nbconvert", "--log-level", "WARN", "--to", "markdown", "--output-dir", ".", "--output", "README", "nbs/index.ipynb"],
                   cwd=copy, check=True)
    assert (copy/"README.md").read_text().replace("](headline.png)", "](nbs/headline.png)") == (ROOT/"README.md").read_text()


def test_nbdev_test_is_a_command():
    done = subprocess.run([tool("nbdev_test"), "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "--n-workers" in done.stdout


def test_notebooks_are_light():
    heavy = {p.name: p.stat().st_size//1024 for p in (ROOT/"nbs").glob("*.ipynb") if p.stat().st_size > 300*1024}
    assert not heavy


def test_figures_have_alternative_texts():
    cells = [(p.stem, cell) for p in (ROOT/"nbs").glob("*.ipynb") for cell in json.loads(p.read_text())["cells"] if cell["cell_type"] == "code"]
    pictured = [(name, cell) for name, cell in cells if any(mime.startswith("image/") for output in cell["outputs"] for mime in output.get("data", {}))]
    assert len(pictured) > 50, "are the figures read?"
    assert not [(name, cell["id"]) for name, cell in pictured if not re.search(r"^#\| fig-alt: ?\S", "".join(cell["source"]), re.M)]


def test_every_notebook_is_in_the_sidebar():
    assert sorted(re.findall(r"\w+\.ipynb", (ROOT/"_quarto.yml").read_text())) == sorted(p.name for p in (ROOT/"nbs").glob("*.ipynb"))


def test_modules_import_only_from_lower_numbers():
    sources = {p.stem: p.read_text() for p in (ROOT/"nbs").glob("[0-9]*.ipynb")}
    order = {re.search(r"#\| default_exp (\w+)", text)[1]: stem for stem, text in sources.items() if "#| default_exp" in text}
    imports = [(module, name) for module in order for name in re.findall(r"^\s*from (?:cxr_study)?\.(\w+) import", (ROOT/f"cxr_study/{module}.py").read_text(), re.M)]
    assert len(order) > 30 and len(imports) > 100, "are the imports read?"
    assert not [(module, name) for module, name in imports if order[name] >= order[module] and module != "cli"]


@pytest.mark.parametrize("module", ["core", "images", "data", "prediction", "evaluation", "calibration", "measures", "decision", "abstention", "promises",
                                    "seeds", "shift", "batch", "report", "sweep", "summary", "reproduce", "card", "checklists",
                                    "serving", "bundle", "predictor", "dicomsr", "guard", "workers", "page", "inference", "service", "container", "results"])
def test_no_torch_outside_training(module):
    code = f"import sys, cxr_study.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
