"""What is released: wheel and sdist that work where no checkout is, a changelog, a citation, workflows, a CPU road."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from configparser import ConfigParser

import pytest
import yaml
from conftest import ROOT, bare
from packaging.requirements import Requirement

import cxr_study
from cxr_study.serve.bundle import example_bundle

SOURCES = ["pyproject.toml", "setup.py", "settings.ini", "MANIFEST.in", "README.md", "LICENSE"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "(wheel, sdist), built from a copy of what a release has; the wheel is made from the sdist"
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *SOURCES, "NOTICE", "cxr_study", "nbs/0*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in tracked.stdout.splitlines():
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    "(python, folder) of a fresh environment with the wheel; its requirements are those of this one"
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv/bin/python"
    if os.name == "nt":
        python = folder / "venv/Scripts/python.exe"
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", python]
    options = ["--no-deps", "--no-index", "--ignore-installed"]  # One may lie on PYTHONPATH
    subprocess.run([*pip, "install", *options, built[0]], check=True)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True)
    # A path in a .pth file comes after the environment's own packages, and its own .pth files are not read
    with open(f"{site.stdout.strip()}/requirements.pth", "w") as file:
        file.write(sysconfig.get_path("purelib") + "\n")
    (folder / "empty").mkdir()
    return python, folder / "empty"


def ask(installed, *args, **environment):
    python, folder = installed
    done = subprocess.run(
        [python, *map(str, args)],
        cwd=folder,
        env=bare(folder) | dict(PYTHONPATH="") | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_and_sdist_hold_what_they_need(built):
    wheel, sdist = built
    names = set(zipfile.ZipFile(wheel).namelist())
    packed = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    for path in (ROOT / "cxr_study").rglob("*"):
        name = path.relative_to(ROOT).as_posix()
        if path.is_file() and "__pycache__" not in name:
            assert name in names and name in packed, name
    for path in ROOT.glob("nbs/0*.ipynb"):
        assert f"cxr_study/notebooks/{path.name}" in names
    assert {"settings.ini", "setup.py", "LICENSE", "NOTICE"} <= packed
    assert not [name for name in names if name.startswith(("tests/", "results/", "models/"))]
    assert wheel.stat().st_size < 2e6


def test_the_three_lines_from_a_wheel(installed):
    "No checkout, an empty folder: import, help, three lines and one `predict`"
    from PIL import Image

    _, folder = installed
    bundle = example_bundle(folder / "bundle")
    Image.new("L", (60, 40), 120).save(folder / "film.jpg")
    code = "import cxr_study; from cxr_study import load; print(cxr_study.__file__);"
    code += "print(load().predict('film.jpg').decision)"
    place, decision = ask(installed, "-c", code, CXR_BUNDLE=str(bundle)).splitlines()
    assert str(folder.parent) in place and decision == "PNEUMONIA"
    assert "Usage:" in ask(installed, "-m", "cxr_study", "--help")
    ask(installed, "-m", "cxr_study", "predict", "film.jpg", "--bundle", bundle)
    assert "film.jpg" in (folder / "predictions.csv").read_text()
    assert (installed[0].parent / ("cxr-study.exe" if os.name == "nt" else "cxr-study")).is_file()


# --- Requirements


def requirements():
    "Name of the extra ('' for the plain installation) -> requirements"
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    found = {}
    for key, text in config["DEFAULT"].items():
        if key.endswith("requirements"):
            extra = key.removesuffix("requirements").removesuffix("_")
            found[extra] = [Requirement(line) for line in text.strip().splitlines()]
    return found


def test_a_cpu_build_of_torch_satisfies_the_requirements():
    "The CPU builds end in +cpu; nothing asks for CUDA, and what serves and evaluates needs no torch"
    by_extra = requirements()
    torch = {r.name: r for r in by_extra["study"] if r.name.startswith("torch")}
    for requirement in torch.values():
        (at_least,) = requirement.specifier
        assert requirement.specifier.contains(f"{at_least.version}+cpu")
    assert set(torch) == {"torch", "torchvision"}
    names = {extra: {r.name for r in found} for extra, found in by_extra.items()}
    assert not [n for found in names.values() for n in found if n.startswith(("nvidia", "cuda"))]
    assert not {"torch", "torchvision", "fastai", "timm"} & (
        names[""] | names["serve"] | names["evaluate"]
    )


@pytest.mark.parametrize("lock, extra", [("serve", "serve"), ("evaluate", "evaluate")])
def test_a_lock_has_every_requirement_of_its_extra(lock, extra):
    text = (ROOT / f"requirements-{lock}.lock").read_text()
    locked = {name.lower() for name in re.findall(r"^([\w.-]+)==", text, re.M)}
    by_extra = requirements()
    for requirement in by_extra[""] + by_extra[extra]:
        assert requirement.name.lower().replace("_", "-") in locked, requirement


def test_the_lock_of_the_validators_lies_on_top_of_that_of_the_study():
    "Nothing is in both, but for rich, of which one validator wants an older one"
    locked = {}
    for lock in ("requirements.lock", "requirements-share.lock"):
        text = (ROOT / lock).read_text()
        locked[lock] = {name.lower() for name in re.findall(r"^([\w.-]+)==", text, re.M)}
    study, share = locked.values()
    assert study & share == {"rich"}
    names = {r.name.lower().replace("_", "-") for r in requirements()["share"]}
    assert names <= study | share


# --- Texts of a release


def test_the_changelog_is_in_the_usual_form():
    "Keep a Changelog: a section a version, the newest first, and in each the kinds of change in order"
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[?([\w.]+)\]?", text, re.M)
    assert versions[0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in versions[1:])
    kinds = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    for section in re.split(r"^## .*$", text, flags=re.M)[1:]:
        found = re.findall(r"^### (.*)$", section, re.M)
        assert found == [kind for kind in kinds if kind in found] and found


def test_the_citation_names_this_version_and_licence():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == cxr_study.__version__
    assert cited["license"] == "Apache-2.0"
    assert all(reference["doi"] for reference in cited["references"])


CFF_KEYS = {  # Of Citation File Format 1.2.0: keys of the file, of a reference and of a person or an entity
    "file": "abstract authors cff-version commit contact date-released doi identifiers keywords license "
    "license-url message preferred-citation references repository repository-artifact repository-code "
    "title type url version",
    "reference": "abstract authors collection-title copyright date-released doi editors isbn issn issue "
    "journal license number pages publisher repository start status title type url version volume year",
    "who": "family-names given-names name-particle name-suffix affiliation orcid email name website",
}


def test_the_citation_has_what_its_format_asks_for():
    "A light check, without the format's schema: required keys, no others, and the forms of values"
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    allowed = {name: set(keys.split()) for name, keys in CFF_KEYS.items()}
    assert {"cff-version", "message", "title", "authors"} <= set(cited) <= allowed["file"]
    assert cited["cff-version"] == "1.2.0" and cited["type"] in ("software", "dataset")
    assert isinstance(cited["version"], str) and all(isinstance(k, str) for k in cited["keywords"])
    for reference in cited["references"]:
        assert {"type", "title", "authors"} <= set(reference) <= allowed["reference"]
        assert re.fullmatch(r"10\.\d{4,9}/\S+", reference["doi"])
        assert isinstance(reference["year"], int)
    for person in sum(
        (reference["authors"] for reference in cited["references"]), cited["authors"]
    ):
        assert set(person) <= allowed["who"] and ("name" in person) != ("family-names" in person)


def test_the_citation_is_valid():
    pytest.importorskip("cffconvert", reason="it wants an older jsonschema than the other packages")
    done = subprocess.run(
        [sys.executable, "-m", "cffconvert.cli.cli", "--validate"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_issue_forms_have_what_github_asks_for(path):
    form = yaml.safe_load(path.read_text())
    if path.name == "config.yml":
        assert all({"name", "url", "about"} == set(link) for link in form["contact_links"])
        return
    assert form["name"] and form["description"]
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert ids and len(ids) == len(set(ids))
    for field in form["body"]:
        assert field["attributes"].get("label") or field["type"] == "markdown"


def test_the_release_publishes_what_was_tested():
    "One build, whose files every later job takes; no password, and one right a job"
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
    trigger = workflow[True]  # YAML reads `on` as true
    assert trigger == {"push": {"tags": ["v*"]}}
    jobs = workflow["jobs"]
    assert not [name for name, job in jobs.items() if name != "build" and "needs" not in job]
    text = (ROOT / ".github/workflows/release.yml").read_text()
    assert "password" not in text.lower().replace("--password-stdin", "")
    assert "secrets." not in text
    assert "test_package.py" in text and "attest-build-provenance" in text


def test_the_matrix_covers_what_the_classifiers_say():
    project = (ROOT / "pyproject.toml").read_text()
    versions = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    matrix = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]["matrix"]
    assert matrix["strategy"]["matrix"]["python"] == versions
    systems = {name.partition("-")[0] for name in matrix["strategy"]["matrix"]["os"]}
    assert systems == {"ubuntu", "macos", "windows"}


# --- One click

TRY = "nbs/howto/try_it.ipynb"


def code_cells(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", ["README.md", "nbs/index.ipynb", TRY])
def test_badges_open_a_notebook_that_is_there(path):
    text = (ROOT / path).read_text()
    for site in ("colab.research.google.com/github/", "kaggle.com/kernels/", "mybinder.org/v2/"):
        (address,) = set(re.findall(rf"https://{re.escape(site)}[^)\s\"]+", text))
        assert address.endswith(TRY) and "cxr-study/cxr_study" in address


def test_the_first_cell_installs_the_study_where_it_is_missing(monkeypatch):
    "And nowhere else; the extra that it names exists"
    first = "".join(code_cells(ROOT / TRY)[0]["source"])
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda command, **kwargs: calls.append(command))
    exec(first, {})
    assert calls == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    exec(first, {})
    requirement = Requirement(calls[0][-1])
    assert requirement.name == "cxr-study" and requirement.extras <= set(requirements())
    assert requirement.url.endswith("github.com/cxr-study/cxr_study")


def test_the_conda_environment_fits_the_package():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *names, pip = environment["dependencies"]
    assert "python=3.11" in names and "pip" in names
    (line,) = pip["pip"]
    extras = re.fullmatch(r"-e \.\[(.*)\]", line)[1].split(",")
    assert set(extras) <= set(requirements())
