"""What describes data sets and published runs for machines, read by the validators of each format."""

import json
import warnings

import pandas as pd
import pytest
import share
from conftest import ROOT

needs = (
    "its packages are in a folder of their own; `make test` runs this file a second time with them"
)


# --- Croissant


@pytest.mark.parametrize("name", share.DATA_SETS)
def test_a_croissant_is_valid_and_gives_the_rows_of_its_tables(name):
    mlc = pytest.importorskip("mlcroissant", reason=needs)
    path = ROOT / f"results/croissant/{name}.json"
    data_set = mlc.Dataset(jsonld=path)
    issues = data_set.metadata.ctx.issues
    assert not issues.errors, issues.report()
    tables = share.DATA_SETS[name]["tables"]
    assert set(tables) <= {record_set.name for record_set in data_set.metadata.record_sets}
    for table, place in tables.items():
        rows = pd.read_csv(ROOT / place)
        records = list(data_set.records(table))
        assert len(records) == len(rows)
        named = {record[f"{table}/image_id"] for record in records} - {None}
        assert {name.decode() for name in named} == set(rows.image_id.dropna())


@pytest.mark.parametrize("name", share.DATA_SETS)
def test_a_croissant_is_what_the_tables_give_today(name):
    pytest.importorskip("mlcroissant", reason=needs)
    path = ROOT / f"results/croissant/{name}.json"
    written = json.dumps(share.croissant(name, path.parent), default=str)
    assert json.loads(path.read_text()) == json.loads(written), "run tools/share.py croissant"


def test_croissants_name_the_files_and_no_patient_is_in_two_splits():
    for name, facts in share.DATA_SETS.items():
        described = json.loads((ROOT / f"results/croissant/{name}.json").read_text())
        for file in described["distribution"]:
            path = (ROOT / "results/croissant" / file["contentUrl"]).resolve()
            assert share.sha256(path) == file["sha256"]
        rows = pd.read_csv(ROOT / facts["tables"]["images"])
        kept = rows[rows.split.isin(["train", "val", "test"])]
        assert (kept.groupby("patient_id").split.nunique() == 1).all()


# --- RO-Crate

TERMS = dict(File="http://schema.org/MediaObject", conformsTo="http://purl.org/dc/terms/conformsTo")


def crate_context(crates):
    "The terms of these crates, where the network does not offer RO-Crate's own context"
    entities = [entity for crate in crates for entity in crate["@graph"]]
    names = {name for entity in entities for name in (*entity, entity["@type"])}
    plain = {n: f"http://schema.org/{n}" for n in names if not n.startswith("@")}
    return {"@context": plain | TERMS}


@pytest.fixture
def offline(monkeypatch):
    "Let the validator read the context of RO-Crate without a network"
    http = pytest.importorskip("rocrate_validator.utils.http", reason=needs)
    crates = [json.loads((f / "ro-crate-metadata.json").read_text()) for f in share.crates()]
    context = crate_context(crates)

    class Answer:
        status_code = 200
        headers = {"Content-Type": "application/ld+json"}
        text = json.dumps(context)
        content = text.encode()

        def json(self):
            return context

    monkeypatch.setattr(http.HttpRequester, "get", lambda *a, **k: Answer(), raising=False)


EXPERIMENTS = {folder.parent: folder for folder in share.crates()}


@pytest.mark.parametrize("folder", EXPERIMENTS.values(), ids=lambda f: f.parent.name)
def test_the_crate_of_a_run_has_no_issue(folder, offline):
    from rocrate_validator import services

    settings = services.ValidationSettings(
        rocrate_uri=str(folder),
        profile_identifier="process-run-crate",
        requirement_severity="RECOMMENDED",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = services.validate(settings)
    assert [(i.check.identifier, i.message) for i in result.get_issues()] == []


def test_each_published_run_has_a_crate_of_its_files():
    assert len(share.crates()) > 20
    for folder in share.crates():
        graph = json.loads((folder / "ro-crate-metadata.json").read_text())["@graph"]
        files = {e["@id"]: e for e in graph if e["@type"] == "File"}
        present = {path.name for path in folder.iterdir()} - {"ro-crate-metadata.json"}
        assert set(files) == present, f"run tools/share.py crates ({folder})"
        for name, entity in files.items():
            assert int(entity["contentSize"]) == (folder / name).stat().st_size


# --- CycloneDX


@pytest.mark.parametrize("lock", share.LOCKS)
def test_the_list_of_a_lock_is_valid_and_complete(lock, tmp_path):
    pytest.importorskip("cyclonedx_py", reason=needs)
    validation = pytest.importorskip("cyclonedx.validation.json", reason=needs)
    from cyclonedx.schema import SchemaVersion

    text = share.write_sbom(lock, tmp_path).read_text()
    assert validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    components = json.loads(text)["components"]
    pinned = [line for line in (ROOT / lock).read_text().splitlines() if "==" in line]
    assert len(components) == len(pinned)
    assert all(component["externalReferences"] for component in components)
