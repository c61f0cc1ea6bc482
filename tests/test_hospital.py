"""Structured reports as an archive sees them: a validator of DICOM objects, and an Orthanc on this machine."""

import io
import json
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import generate_uid

from cxr_study.data.dicom import to_dicom
from cxr_study.data.formats import UnsupportedDicom
from cxr_study.serve.bundle import example_bundle
from cxr_study.serve.predictor import Predictor
from cxr_study.serve.structured_report import StoreError, store_report, structured_report

RAMP = np.linspace(0, 255, 96).astype(np.uint8) * np.ones((64, 1), np.uint8)
DICOMWEB = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
needs_dciodvfy = pytest.mark.skipif(
    not shutil.which("dciodvfy"), reason="needs dicom3tools: apt-get install dicom3tools"
)
needs_orthanc = pytest.mark.skipif(
    not (shutil.which("Orthanc") and DICOMWEB.exists()),
    reason="needs Orthanc: apt-get install orthanc orthanc-dicomweb",
)


@pytest.fixture(scope="module")
def answer(tmp_path_factory):
    return Predictor(example_bundle(tmp_path_factory.mktemp("bundle")))(film())


def film(**values):
    "A radiograph in a study of its own, with these values in its header"
    ids = dict(StudyInstanceUID=generate_uid(), SeriesInstanceUID=generate_uid(), PatientID="1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return to_dicom(RAMP, **ids | values)


def errors_of(report, folder):
    "Lines of dciodvfy that name an error"
    path = folder / "report.dcm"
    path.write_bytes(report)
    done = subprocess.run(
        ["dciodvfy", "-new", path], capture_output=True, text=True, errors="replace", timeout=60
    )
    assert "Comprehensive3DSR" in done.stdout + done.stderr
    return [line for line in (done.stdout + done.stderr).splitlines() if "Error" in line]


# --- Valid objects


@needs_dciodvfy
@pytest.mark.parametrize("presence", ["present", "absent", "indeterminate"])
def test_a_report_has_no_error_for_dciodvfy(answer, tmp_path, presence):
    given = answer | dict(
        abstains=presence == "indeterminate",
        decision="PNEUMONIA" if presence == "present" else "NORMAL",
    )
    whole = dict(
        PatientName="Yamada^Tarou=山田^太郎=やまだ^たろう",
        PatientBirthDate="19620228",
        PatientSex="M",
        PatientAge="062Y",
        AccessionNumber="A1",
        StudyID="7",
        StudyDate="20241127",
        StudyTime="101112.5",
        StudyDescription="Thorax, übersicht",
        ReferringPhysicianName="Doe^Jane",
        SpecificCharacterSet="ISO_IR 192",
    )
    report = structured_report(film(**whole), given)
    assert errors_of(report, tmp_path) == []
    read = pydicom.dcmread(io.BytesIO(report))
    for name in set(whole) - {"SpecificCharacterSet"}:
        assert str(read[name].value) == whole[name], name


ATTRIBUTES = (
    "PatientName PatientBirthDate PatientSex PatientAge AccessionNumber StudyID StudyDate StudyTime "
    "StudyDescription ReferringPhysicianName PatientID IssuerOfPatientID PatientSize PatientWeight EthnicGroup "
    "PatientComments AdditionalPatientHistory Occupation InstitutionName NameOfPhysiciansReadingStudy"
).split()
BROKEN = [
    "62",
    "tomorrow",
    "99999999",
    "a" * 70,
    "a" * 200,
    "x\\y",
    "two\nlines",
    "\x07",
    "Male",
    "é" * 65,
]


@needs_dciodvfy
@pytest.mark.parametrize("name", ATTRIBUTES)
def test_no_invalid_value_of_a_film_reaches_its_report(answer, tmp_path, name):
    for value in BROKEN:
        dataset = pydicom.dcmread(io.BytesIO(film()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset.SpecificCharacterSet = "ISO_IR 100"
            try:
                setattr(dataset, name, value)
                buffer = io.BytesIO()
                dataset.save_as(buffer)
            except ValueError:  # No number: pydicom cannot even write it
                continue
        try:
            report = structured_report(buffer.getvalue(), answer)
        except UnsupportedDicom as error:
            assert name == "PatientID" and "its PatientID is not valid" in str(error)
        else:
            assert errors_of(report, tmp_path) == [], (name, value)


@needs_dciodvfy
def test_a_real_film_gives_a_valid_report(data, answer, tmp_path):
    seen = 0
    for path in sorted((data / "dicom").glob("*.dcm")):
        try:
            report = structured_report(path.read_bytes(), answer)
        except UnsupportedDicom as error:
            assert "Request JSON" in str(error)
        else:
            assert errors_of(report, tmp_path) == []
            seen += 1
    assert seen


# --- An archive


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory):
    "Root of the DICOMweb services of an Orthanc that listens on this machine alone, and its password"
    folder = tmp_path_factory.mktemp("orthanc")
    port = free_port()
    settings = dict(
        StorageDirectory=str(folder / "storage"),
        IndexDirectory=str(folder / "storage"),
        HttpPort=port,
        HttpServerEnabled=True,
        HttpBindAddresses=["127.0.0.1"],
        DicomServerEnabled=False,
        RemoteAccessAllowed=False,
        AuthenticationEnabled=True,
        RegisteredUsers=dict(test="secret"),
        Plugins=[str(DICOMWEB)],
        DicomWeb=dict(Enable=True, Root="/dicom-web/"),
    )
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(["Orthanc", folder / "orthanc.json"], stdout=log, stderr=log)
    try:
        wait_for(process, port, folder / "log")
        yield f"http://127.0.0.1:{port}/dicom-web"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def wait_for(process, port, log, seconds=60):
    for _ in range(10 * seconds):
        assert process.poll() is None, log.read_text()
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail(f"Orthanc does not listen after {seconds} s: {log.read_text()}")


CREDENTIALS = "Basic dGVzdDpzZWNyZXQ="  # test:secret


def found(server, **query):
    "Instances that QIDO-RS finds"
    address = f"{server}/instances?{urllib.parse.urlencode(query)}"
    headers = dict(Accept="application/dicom+json", Authorization=CREDENTIALS)
    with urllib.request.urlopen(urllib.request.Request(address, None, headers), timeout=30) as got:
        return json.load(got)


@needs_orthanc
def test_a_report_reaches_an_archive_and_is_found_there(orthanc, answer, monkeypatch):
    monkeypatch.setenv("CXR_STOW_AUTHORIZATION", CREDENTIALS)
    report = structured_report(film(PatientName="Yamada^Tarou", PatientAge="62"), answer)
    written = pydicom.dcmread(io.BytesIO(report))
    assert found(orthanc, StudyInstanceUID=written.StudyInstanceUID) == []
    store_report(report, orthanc)
    (item,) = found(orthanc, StudyInstanceUID=written.StudyInstanceUID, Modality="SR")
    assert item["00080018"]["Value"] == [written.SOPInstanceUID]


@needs_orthanc
def test_predict_sends_reports_to_an_archive(orthanc, cli, tmp_path):
    bundle = example_bundle(tmp_path / "bundle")
    content = film()
    (tmp_path / "film.dcm").write_bytes(content)
    arguments = ["--bundle", bundle, "--out", tmp_path / "out.csv", "--stow", orthanc]
    study = pydicom.dcmread(io.BytesIO(content)).StudyInstanceUID
    environment = dict(no_proxy="127.0.0.1")  # `cli` has a proxy that answers nothing
    done = cli("predict", tmp_path / "film.dcm", *arguments, check=False, **environment)
    assert done.returncode == 1
    assert "refused the report with status 401" in (tmp_path / "out.csv").read_text()
    assert found(orthanc, StudyInstanceUID=study) == []
    environment["CXR_STOW_AUTHORIZATION"] = CREDENTIALS
    cli("predict", tmp_path / "film.dcm", *arguments, **environment)
    assert len(found(orthanc, StudyInstanceUID=study)) == 1


@needs_orthanc
def test_what_an_archive_refuses_is_an_error(orthanc, monkeypatch):
    monkeypatch.setenv("CXR_STOW_AUTHORIZATION", CREDENTIALS)
    dataset = pydicom.dcmread(io.BytesIO(film()))
    del dataset.StudyInstanceUID
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    with pytest.raises(StoreError, match="refused|does not say"):
        store_report(buffer.getvalue(), orthanc)
