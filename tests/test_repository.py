"""The tree itself: notebooks, library, README and site belong together."""

import ast
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from marks import prose, stale, texts
from nbdev.doclinks import nbpath2html

from checklists import anchor, headings
from cxr_study.core.options import STAGES, parameters_cell


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of what git tracks, so that checks that write do not touch the checkout"
    folder = tmp_path_factory.mktemp("copy")
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)

    def run(*args):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, *args], cwd=folder, check=True, capture_output=True)

    run("init", "-q")
    run("add", "-A")
    run("commit", "-qm", "copy")
    return folder


def changes(folder):
    return subprocess.run(
        ["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True, check=True
    ).stdout


def notebooks(root):
    "Every notebook of the project, in whatever folder"
    return sorted(
        p
        for p in (root / "nbs").rglob("*.ipynb")
        if not any(part.startswith((".", "_")) for part in p.relative_to(root).parts)
    )


def tool(name):
    return str(Path(sys.executable).parent / name)


def test_clean_and_export_change_nothing(copy):
    for command in ("nbdev-clean", "nbdev-export"):
        subprocess.run([tool(command)], cwd=copy, check=True, capture_output=True)
    assert changes(copy) == ""


def test_docs_can_be_built_up_to_quarto(copy):
    # IPython's shells of all pages would take longer to end than the pages to build
    code = "import os; from nbdev.serve import proc_nbs; proc_nbs(n_workers=0); os._exit(0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = list((copy / "_proc").rglob("*.ipynb"))
    assert len(pages) == len(notebooks(ROOT)) > 50
    documented = [
        ("".join(cell["source"]), output["data"], page.name)
        for page in pages
        for cell in json.loads(page.read_text())["cells"]
        if "show_doc(" in "".join(cell["source"])
        for output in cell["outputs"]
    ]
    assert len(documented) > 300
    assert [(name, page) for name, shown, page in documented if not shown] == []
    # A link in a link is none
    nested = r"\[[^\]\[]*(?<!!)\[[^\]]*\]\([^)]*\)[^\]\[]*\]\("
    assert [page.name for page in pages if re.search(nested, "".join(prose(page)))] == []


def test_readme_is_the_index_notebook(copy):
    subprocess.run(
        [
            tool("jupyter"),
            "nbconvert",
            "--log-level",
            "WARN",
            "--to",
            "markdown",
            "--output-dir",
            ".",
            "--output",
            "README",
            "nbs/index.ipynb",
        ],
        cwd=copy,
        check=True,
    )
    assert (copy / "README.md").read_text().replace("](headline.png)", "](nbs/headline.png)") == (
        ROOT / "README.md"
    ).read_text()


def test_nbdev_test_is_a_command():
    done = subprocess.run([tool("nbdev_test"), "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "--n-workers" in done.stdout


# --- Checks of the whole tree: each gives a list of what is wrong, and each finds what is planted below

HEAVY = 300 * 1024
SITE = "https://cxr-study.github.io/cxr_study/"
# A module imports from its own room's lower numbers and from rooms further down; rooms of one line do not know
# each other
LEVELS = [
    ["core"],
    ["data"],
    ["predict"],
    ["train", "evaluate"],
    ["calibrate"],
    ["explain", "robust"],
    ["serve"],
    ["pipeline"],
    ["cli"],
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def room_of(module):
    return "cli" if module == "__main__" else module.split(".")[0]


NEED_TORCH = {"pipeline.export"}


def heavy(root):
    return [p.name for p in notebooks(root) if p.stat().st_size > HEAVY]


def pictures(root):
    "(notebook, code cell) of every cell with a picture in its outputs"
    found = []
    for path in notebooks(root):
        for cell in json.loads(path.read_text())["cells"]:
            shown = [mime for output in cell.get("outputs", []) for mime in output.get("data", {})]
            if any(mime.startswith("image/") for mime in shown):
                found.append((path.name, cell))
    return found


def undescribed(root):
    return [
        (name, cell["id"])
        for name, cell in pictures(root)
        if not re.search(r"^#\| fig-alt: ?\S", "".join(cell["source"]), re.M)
    ]


def not_in_sidebar(root):
    "Notebooks that the sidebar does not name, and names that are no notebook"
    _, _, sidebar = (root / "_quarto.yml").read_text().partition("\n  sidebar:\n")
    named = re.findall(r"[\w/]+\.ipynb", sidebar)
    there = [p.relative_to(root / "nbs").as_posix() for p in notebooks(root)]
    return sorted(set(named) ^ set(there)) + [name for name in set(named) if named.count(name) > 1]


def library_notebooks(root):
    "Module such as `data.images` -> number of its notebook in `nbs/lib`"
    found = {}
    for path in (root / "nbs/lib").rglob("*.ipynb"):
        if module := re.search(r"#\| default_exp ([\w.]+)", path.read_text()):
            found[module[1]] = int(path.name[:2])
    return found


def imports(root, module):
    "Modules of the project that a module imports, at its top or inside a function"
    path = root / "cxr_study" / f"{module.replace('.', '/')}.py"
    package = ["cxr_study", *module.split(".")[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*start, *(node.module or "").split(".")]).strip(".")
            found |= {name, *(f"{name}.{alias.name}" for alias in node.names)}
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.removeprefix("cxr_study.") for name in found if name.startswith("cxr_study.")}


def upward(root):
    "(module, what it imports) of every import that does not go down"
    number = library_notebooks(root)
    room = {module: room_of(module) for module in number}
    found = []
    for module in number:
        for name in sorted(imports(root, module) & set(number)):
            own = room[name] == room[module] and number[name] < number[module]
            if not own and LEVEL[room[name]] >= LEVEL[room[module]]:
                found.append((module, name))
    return found


def _anchors(path):
    "Identifiers of a page: its headings, and the exported names that it documents"
    found = {anchor(h) for h in headings(path)}
    if path.suffix == ".ipynb":
        found |= {name.lower() for name in re.findall(r"^(?:def|class) (\w+)", code_of(path), re.M)}
    return found


def code_of(path):
    return "\n".join(
        "".join(c["source"])
        for c in json.loads(path.read_text())["cells"]
        if c["cell_type"] == "code"
    )


def addresses(root):
    "The pages of the site, whose addresses have no numbers"
    return {nbpath2html(p.relative_to(root / "nbs")).as_posix() for p in notebooks(root)}


def broken_links(root):
    "(text, link) of every link to a file, heading or page of the project that is not there"
    found = []
    pages = addresses(root)
    for path in texts(root):
        text = re.sub(r"```.*?```|`[^`]*`", "", prose(path), flags=re.S)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            file, _, place = link.partition("#")
            target = path.parent / file if file else path
            page = file.removeprefix(SITE)
            if page != file and page and page not in pages:
                found.append((path.name, link))
            if re.match(r"\w+:", link) or file.startswith("_proc"):
                continue
            if not target.exists() or (
                place and target.suffix in (".ipynb", ".md") and place not in _anchors(target)
            ):
                found.append((path.name, link))
    return found


def dropped(root):
    "Notebooks whose title cell has more than the title and a `>` line, which the site leaves out"
    return [
        path.name
        for path in notebooks(root)
        if not re.fullmatch(
            r"# .*\n\n> .*\n?", "".join(json.loads(path.read_text())["cells"][0]["source"])
        )
    ]


def test_the_site_leaves_no_text_out():
    assert dropped(ROOT) == []


def test_every_link_leads_somewhere():
    assert broken_links(ROOT) == []


def test_notebooks_are_light():
    assert heavy(ROOT) == []


def test_figures_have_alternative_texts():
    assert len(pictures(ROOT)) > 50, "are the figures read?"
    assert undescribed(ROOT) == []


def test_the_help_that_a_notebook_shows_is_that_of_the_commands():
    from click.testing import CliRunner

    from cxr_study.cli import main

    cells = json.loads((ROOT / "nbs/lib/cli/01_cli.ipynb").read_text())["cells"]
    shown = 0
    for cell in cells:
        command = re.match(r"print_help\((?:'([\w-]+)')?\)", "".join(cell["source"]))
        if not command:
            continue
        args = [*filter(None, command.groups()), "--help"]
        expected = CliRunner().invoke(main, args, prog_name="cxr-study").output
        stored = "".join("".join(output.get("text", "")) for output in cell["outputs"])
        assert expected.strip() in stored, args
        shown += 1
    assert shown >= len(main.commands)


def test_every_notebook_is_in_the_sidebar():
    assert not_in_sidebar(ROOT) == []


def test_modules_import_only_from_lower_numbers():
    modules = library_notebooks(ROOT)
    assert len(modules) > 30 and sum(len(imports(ROOT, m)) for m in modules) > 100, (
        "are the imports read?"
    )
    assert upward(ROOT) == []


@pytest.mark.parametrize("stage", list(STAGES))
def test_the_parameters_cell_of_a_stage_is_made_from_its_options(stage):
    cells = json.loads((ROOT / f"nbs/{stage}.ipynb").read_text())["cells"]
    shown = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
    assert shown == [parameters_cell(stage)], (
        f"write what parameters_cell('{stage}') of core.options prints into the cell tagged parameters"
    )
    code = [c for c in cells if c["cell_type"] == "code"]
    assert [c for c in code[:5] if "parameters" in c["metadata"].get("tags", [])], (
        "the parameters are among the first five code cells"
    )


def test_every_module_has_its_notebook():
    rooms = [
        p for p in (ROOT / "cxr_study").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py")
    ]
    modules = {".".join(p.relative_to(ROOT / "cxr_study").with_suffix("").parts) for p in rooms}
    exporting = {
        m[1]
        for p in notebooks(ROOT)
        if (m := re.search(r"#\| default_exp ([\w.]+)", p.read_text()))
    }
    assert modules == exporting


@pytest.mark.parametrize(
    "room", ["core", "data", "predict", "evaluate", "calibrate", "serve", "pipeline", "cli"]
)
def test_no_torch_outside_training(room):
    modules = [m for m in library_notebooks(ROOT) if room_of(m) == room and m not in NEED_TORCH]
    assert modules
    code = f"""
import importlib, sys
for module in {sorted(modules)}:
    importlib.import_module("cxr_study." + module)
    if "torch" in sys.modules: sys.exit(module + " imports torch")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_what_is_planted_in_nested_folders_is_found(copy):
    "A heavy notebook, a picture without a text, a notebook missing from the sidebar, an upward import, a stale figure"
    before = {
        check: check(copy) for check in (heavy, undescribed, not_in_sidebar, upward, broken_links)
    }
    figure = dict(output_type="display_data", metadata={}, data={"image/png": "A" * HEAVY})
    code = dict(
        cell_type="code",
        id="planted",
        metadata={},
        execution_count=None,
        source=["draw()"],
        outputs=[figure],
    )
    text = dict(
        cell_type="markdown",
        id="quoted",
        metadata={},
        source=[
            "<!--q results/first_edition/summary.json pneumoniamnist-resnet18:ensemble.auc-->0.123<!--/q--> "
            f"[x](01_formats.ipynb#nowhere) [y]({SITE}lib/data/01_formats.html)"
        ],
    )
    planted = copy / "nbs/lib/data/99_planted.ipynb"
    planted.write_text(
        json.dumps(dict(cells=[code, text], metadata={}, nbformat=4, nbformat_minor=5))
    )
    module = copy / "cxr_study/data/formats.py"
    kept = module.read_text()
    module.write_text(kept + "\ndef late():\n    from ..evaluate import metrics\n")
    new = {
        check.__name__: [x for x in check(copy) if x not in found]
        for check, found in before.items()
    }
    assert new == dict(
        heavy=["99_planted.ipynb"],
        undescribed=[("99_planted.ipynb", "planted")],
        not_in_sidebar=["lib/data/99_planted.ipynb"],
        broken_links=[
            ("99_planted.ipynb", "01_formats.ipynb#nowhere"),
            ("99_planted.ipynb", f"{SITE}lib/data/01_formats.html"),
        ],
        upward=[("data.formats", "evaluate.metrics")],
    )
    assert [shown for _, shown, _ in stale(notebooks(copy), copy)] == [
        text["source"][0].partition(" [")[0]
    ]
    planted.unlink()
    module.write_text(kept)


# --- Images and workflows


WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def actions(value):
    "Every `uses` in a workflow"
    if isinstance(value, dict):
        found = [value["uses"]] if "uses" in value else []
        return found + [a for child in value.values() for a in actions(child)]
    if isinstance(value, list):
        return [a for child in value for a in actions(child)]
    return []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_actions_are_pinned_and_have_few_permissions(path):
    "By the full commit, with the version beside it; the right to write belongs to single jobs"
    workflow = yaml.safe_load(path.read_text())
    assert actions(workflow)
    for action in actions(workflow):
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action), action
        assert re.search(re.escape(action) + r"  # v\d", path.read_text()), action
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 90, name
        checkouts = [s for s in job["steps"] if s.get("uses", "").startswith("actions/checkout@")]
        assert all(step["with"]["persist-credentials"] is False for step in checkouts), name
        allowed = {"pages", "id-token"}
        if path.name == "release.yml":
            allowed |= {"contents", "packages", "attestations"}
        assert not set(job.get("permissions", {})) - allowed, name


def test_images_have_a_base_by_digest_an_sbom_and_a_scan():
    dockerfile = (ROOT / "Dockerfile").read_text()
    bases = re.findall(r"^FROM (\S+)(?: AS (\w[\w-]*))?", dockerfile, re.M)
    stages = {stage for _, stage in bases}
    assert {base for base, _ in bases} <= stages | {"${BASE_IMAGE}"}
    assert re.search(r"^ARG BASE_IMAGE=\S+@sha256:[0-9a-f]{64}$", dockerfile, re.M)
    used = " ".join(actions(yaml.safe_load((ROOT / ".github/workflows/images.yml").read_text())))
    assert "anchore/sbom-action@" in used and "anchore/scan-action@" in used


class _Health(http.server.BaseHTTPRequestHandler):
    "A service that is ready, is not, or does not answer"

    status = 200

    def do_GET(self):
        if self.status is None:
            time.sleep(10)
        self.send_response(self.status if self.path == "/readyz" else 200)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("status, code", [(200, 0), (503, 1), (429, 1), (None, 1)])
def test_the_health_check_of_the_image_fails_when_the_service_is_not_ready(status, code):
    command = re.search(r"^HEALTHCHECK .* CMD (\[.*\])$", (ROOT / "Dockerfile").read_text(), re.M)
    _, option, program = json.loads(command[1])
    handler = type("Handler", (_Health,), dict(status=status))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # A client that gave up is part of the test
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    program = program.replace("127.0.0.1:8000", f"127.0.0.1:{server.server_port}")
    started = time.time()
    done = subprocess.run([sys.executable, option, program], capture_output=True)
    server.shutdown()
    assert (done.returncode != 0) == bool(code)
    assert time.time() - started < 6, "Docker stops a check after 3 seconds on a quiet machine"


TEXT_CALLS = ("read_text", "write_text", "open")


def is_text_without_encoding(node):
    "Whether a call reads or writes text in an encoding that differs between systems"
    if not isinstance(node, ast.Call):
        return False
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    if name not in TEXT_CALLS or any(word.arg == "encoding" for word in node.keywords):
        return False
    modes = [*node.args, *(word.value for word in node.keywords if word.arg == "mode")]
    modes = [mode.value for mode in modes if isinstance(mode, ast.Constant)]
    return name != "open" or any(mode in ("r", "w", "a", "x") for mode in modes)


def test_the_library_reads_and_writes_text_as_utf8():
    assert is_text_without_encoding(ast.parse("open(path, 'a')").body[0].value)
    assert not is_text_without_encoding(ast.parse("open(path, 'rb')").body[0].value)
    at_fault = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (ROOT / "cxr_study").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if is_text_without_encoding(node)
    ]
    assert not at_fault
