"""The service as a process on 127.0.0.1: agreement with the run, bad input, load, stopping, the OpenAPI document,
and the page in a browser.

CXR_FUZZ=20000 sets the number of damaged files (default 300), CXR_CASES=500 the number of generated requests for each
operation (default 25).
"""

import asyncio
import base64
import contextlib
import http.client
import io
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hostile
import numpy as np
import pydicom
import pytest
import uvloop
from conftest import COMMAND, ROOT
from load_client import exchange, form_bytes, load, post, request_bytes, running, summary
from PIL import Image
from pydicom.uid import generate_uid

from cxr_study.core.run import Run, sha256
from cxr_study.data.dicom import to_dicom
from cxr_study.serve.bundle import example_bundle, load_bundle
from cxr_study.serve.guard import Settings
from cxr_study.serve.service import _Listener

for needed in ("fastapi", "onnxruntime", "onnx"):
    pytest.importorskip(needed, reason="needs the packages of the extra `serve`, and onnx")

RAMP = np.linspace(0, 255, 320).astype(np.uint8) * np.ones((240, 1), np.uint8)
CLEAR = RAMP // 2 + 120  # The example network is sure of this one


def shade(grey):
    "A picture of 32 grey levels with this mean"
    steps = np.r_[-16:0, 1:17]
    return np.tile(grey + steps, (32, 1)).astype(np.uint8)


def encode(x, format="JPEG", **kwargs):
    "The bytes of an image file"
    image = x if isinstance(x, Image.Image) else Image.fromarray(x)
    buffer = io.BytesIO()
    image.save(buffer, format, **kwargs)
    return buffer.getvalue()


FORM = "multipart/form-data; boundary=x"


def form_of(*contents, field="file", filename="a"):
    "The body of a form of the media type `FORM`"
    head = f'--x\r\ncontent-disposition: form-data; name="{field}"; filename="{filename}"\r\n\r\n'
    parts = [head.encode() + content + b"\r\n" for content in contents]
    return b"".join(parts) + b"--x--\r\n"


def in_study(x=RAMP, **elements):
    "A DICOM radiograph that belongs to a study"
    return to_dicom(
        x, StudyInstanceUID=generate_uid(None), SeriesInstanceUID=generate_uid(None), **elements
    )


@pytest.fixture(scope="module")
def brightness(tmp_path_factory):
    return example_bundle(tmp_path_factory.mktemp("bundle"), size=32)


@pytest.fixture(scope="module")
def service(brightness):
    with running(brightness, receive_seconds=2.0, drain_seconds=0.2) as s:
        yield s


def detail(answer):
    return json.loads(answer[1])["detail"]


def memory(process):
    "Resident memory of a process, MB"
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


# --- The bundle of a trained network, and agreement with its run ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "(run, bundle, image set, images, rows) of a network that was trained briefly on phantoms"
    torch = pytest.importorskip("torch", reason="needs the packages of the extra `study`")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    folder = tmp_path_factory.mktemp("trained")
    before, os.environ["CXR_CACHE"] = os.environ.get("CXR_CACHE"), str(folder / "cache")
    try:
        yield make_trained(torch, folder)
    finally:
        os.environ.pop("CXR_CACHE") if before is None else os.environ.update(CXR_CACHE=before)


def make_trained(torch, folder):
    from cxr_study.data.cache import cache_path, decoded
    from cxr_study.data.images import Preprocess
    from cxr_study.data.sets import phantom
    from cxr_study.data.splits import make_split, split_counts
    from cxr_study.pipeline.export import make_bundle
    from cxr_study.serve.bundle import example_calibration
    from cxr_study.train.networks import save_model
    from cxr_study.train.recipe import Recipe
    from cxr_study.train.training import Training, TrainingData, predict_table, train

    spec, drawn = Preprocess(size=32), phantom(images=120, pixels=96)
    images, index, meta = decoded(drawn, spec)
    table, facts = make_split(drawn, index.sha256)
    cpu, recipe = torch.device("cpu"), Recipe(epochs=1, batch_size=16, lr=1e-3, precision="fp32")
    model, _ = train(
        Training("test_resnet", recipe=recipe),
        TrainingData(images, table, spec),
        folder / "c.pt",
        say=str,
        device=cpu,
    )
    run = Run(folder / "run").begin("01_data")
    run.write("preprocess.json", spec.to_dict())
    run.write("split.csv", table)
    run.write(
        "data.json",
        dict(
            cache=cache_path(drawn, spec).name, cache_sha256=meta["images_sha256"], tolerated=None
        ),
    )
    run.finish(
        synthetic=True,
        data=dict(
            dataset="phantom",
            requested="phantom",
            counts=split_counts(table).T.to_dict(),
            patients_known=True,
        ),
    )
    save_model(run.begin("02_training"), model.cpu(), arch="test_resnet", seed=0)
    run.write("predictions.csv", predict_table(model, images, table))
    run.finish()
    run.begin("04_calibration").write("calibration.json", example_calibration().to_dict())
    run.finish()
    return run, make_bundle(run.folder), drawn, images, table.set_index("image_id").row


def answers_for(url, contents, kind="image/png", path="/predict"):
    "Answers for these files, several at a time"

    def answer_for(content):
        status, body = post(url + path, content, kind)
        assert status == 200, body
        return json.loads(body)

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(answer_for, contents))


def check_agreement(answers, logits, calibration):
    difference = np.abs([answer["logit"] for answer in answers] - logits).max()
    assert difference <= 1e-4, f"largest difference {difference:.2g}"
    decisions = [answer["decision"] == "PNEUMONIA" for answer in answers]
    assert decisions == calibration.decide(logits).tolist()


def test_the_service_answers_what_the_run_predicted(trained):
    run, bundle, drawn, images, row = trained
    loaded = load_bundle(bundle)
    parity = loaded.facts["parity"]
    assert parity["images_at_hand"] and parity["largest_difference"] <= 1e-4
    table = run.read("predictions.csv")
    contents = [encode(drawn.source(int(row[i])), "PNG") for i in table.image_id]
    with running(bundle, drain_seconds=0.2) as s:
        answers = answers_for(s.url, contents, path="/explain")
    check_agreement(answers, table.logit.to_numpy(), loaded.calibration)
    for answer, i in zip(answers, table.image_id):
        seen = Image.open(io.BytesIO(base64.b64decode(answer["seen_png"])))
        assert np.array_equal(np.asarray(seen), images[row[i]])


def shipped():
    "A bundle in models/ and the published table of predictions that it was compared with"
    for file in ROOT.glob("models/*/bundle.json"):
        recorded = json.loads(file.read_text()).get("predictions_sha256")
        for predictions in (ROOT / "results").rglob("seed*/predictions.csv"):
            if sha256(predictions) == recorded:
                return file.parent, predictions
    pytest.skip("there is no bundle in models/ whose predictions are in results/")


def test_the_shipped_bundle_answers_what_was_published(data):
    import pandas as pd

    bundle, predictions = shipped()
    table = pd.read_csv(predictions).query("split == 'test'")
    files = [data / "chest_xray" / i for i in table.image_id]
    if not all(file.exists() for file in files):
        pytest.skip("its images are not available")
    contents = [file.read_bytes() for file in files]
    with running(bundle, drain_seconds=0.2) as s:
        answers = answers_for(s.url, contents, "image/jpeg")
    check_agreement(answers, table.logit.to_numpy(), load_bundle(bundle).calibration)


def test_a_batch_answers_as_single_images_do(service):
    contents = [encode((RAMP * f).astype(np.uint8)) for f in (0.2, 0.5, 0.9)]
    single = [answer["logit"] for answer in answers_for(service.url, contents, "image/jpeg")]
    status, body = post(service.url + "/predict/batch", form_of(*contents, field="files"), FORM)
    assert status == 200
    assert [result["logit"] for result in json.loads(body)["results"]] == single


def test_the_service_has_no_threads_of_blas():
    "They wait in a busy loop, which takes a core from the requests"
    code = (
        "import cxr_study.serve.guard, threadpoolctl; "
        "print([p['num_threads'] for p in threadpoolctl.threadpool_info()])"
    )
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) and set(json.loads(done.stdout)) == {1}


def test_serving_needs_no_torch():
    modules = ("bundle", "predictor", "structured_report", "guard", "service")
    code = (
        "import sys; "
        + "; ".join(f"import cxr_study.serve.{m}" for m in modules)
        + "; sys.exit(bool({'torch', 'pandas', 'fastai', 'sklearn', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_service_opens_no_connection_to_other_machines(service):
    "Every socket of the process leads to this machine, and the telemetry of ONNX Runtime is off"
    post(service.url + "/predict", encode(RAMP))
    assert "ORT_DISABLE_TELEMETRY" in (ROOT / "cxr_study/serve/predictor.py").read_text()
    assert "telemetry" not in service.log.read_text()
    process = Path(f"/proc/{service.process.pid}")
    opened = {os.readlink(file) for file in (process / "fd").iterdir()}
    for protocol in ("tcp", "udp"):
        for line in (process / "net" / protocol).read_text().splitlines()[1:]:
            fields = line.split()
            if f"socket:[{fields[9]}]" in opened:
                assert fields[2].split(":")[0] in ("0100007F", "00000000"), line


def test_nothing_of_the_service_unpickles():
    for m in ("bundle", "predictor", "structured_report", "guard", "service"):
        assert not re.search(
            r"\bpickle\b|torch\.load|\beval\(|\bexec\(",
            (ROOT / f"cxr_study/serve/{m}.py").read_text(),
        ), m


# --- Bad input ---


def bad_files():
    big = encode(Image.new("L", (10_000, 10_000)), "PNG")
    grey = Image.fromarray(RAMP)
    return {
        "empty": (b"", 400, "empty"),
        "text as .jpg": (b"this is not an image", 415, "neither JPEG nor PNG nor DICOM"),
        "truncated": (encode(RAMP)[:2000], 422, "truncated or damaged"),
        "bomb": (big, 422, "at most 40,000,000"),
        "strip": (encode(Image.new("L", (4000, 20)), "PNG"), 422, "Send the whole image"),
        "dicom strip": (to_dicom(RAMP[:1]), 422, "Send the whole image"),
        "animated": (
            encode(grey, "PNG", save_all=True, append_images=[grey.rotate(5)]),
            415,
            "animated",
        ),
        "cmyk": (encode(Image.new("CMYK", (64, 64))), 415, "CMYK"),
        "gif": (encode(grey, "GIF"), 415, "neither"),
        "webp": (encode(grey, "WEBP"), 415, "neither"),
        "dicom without pixels": (to_dicom(RAMP, PixelData=None), 422, "no pixel data"),
        "ct": (to_dicom(RAMP, Modality="CT"), 422, "modality is CT"),
        "lateral": (to_dicom(RAMP, ViewPosition="LL"), 422, "lateral"),
        "damaged dicom": (to_dicom(RAMP)[:-5000], 422, "damaged"),
    }


@pytest.mark.parametrize("name", list(bad_files()))
def test_unusable_files_are_rejected_with_a_sentence(service, name):
    content, status, sentence = bad_files()[name]
    start = time.perf_counter()
    answer = post(service.url + "/predict", content, "image/jpeg")
    assert answer[0] == status and sentence in detail(answer)
    assert time.perf_counter() - start < 2
    assert not re.search(r"Traceback|/home|/work|/tmp|\.py|Error\b", answer[1].decode())
    form = form_of(content, filename="secret-name.jpg")
    assert post(service.url + "/predict", form, FORM)[0] == status


def test_unusable_requests_are_rejected(service):
    jpeg, form, url = encode(RAMP), form_of(b"abc", field="image"), service.url + "/predict"
    wrong_field = post(url, form, FORM)
    assert wrong_field[0] == 422 and "fields named `file`" in detail(wrong_field)
    report_of_a_jpeg = post(url, jpeg, Accept="application/dicom")
    assert report_of_a_jpeg[0] == 422 and "needs a DICOM image" in detail(report_of_a_jpeg)
    assert post(url, form, "multipart/form-data")[0] == 400  # Without a boundary
    assert post(url, b"abc", "text/plain")[0] == 415
    assert post(url + "?prevalence=1.5", jpeg)[0] == 422
    assert post(url + "?point=none", jpeg)[0] == 422


def test_a_colour_photograph_is_answered_and_flagged(service):
    photo = encode(np.dstack([RAMP, RAMP // 2, 255 - RAMP]))
    grey_as_rgb = encode(Image.fromarray(RAMP).convert("RGB"))
    flagged, plain = answers_for(service.url, [photo, grey_as_rgb], "image/jpeg")
    assert flagged["unfamiliar"] is True and flagged["abstains"]
    assert "colour" in flagged["unfamiliar_reason"]
    assert plain["unfamiliar"] is None
    assert "No familiarity check" in plain["unfamiliar_reason"]


def test_fifty_megabytes_are_rejected_while_they_arrive(service):
    before = memory(service.process)
    assert post(service.url + "/predict", bytes(50_000_000))[0] == 413

    async def chunked():
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", int(service.url.rsplit(":", 1)[1])
        )
        writer.write(
            b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: image/png\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        sent, chunk = 0, b"100000\r\n" + bytes(2**20) + b"\r\n"
        try:
            while sent < 400 and not reader._buffer:
                writer.write(chunk)
                sent += 1
                await writer.drain()
        except ConnectionError:
            pass
        answer = await reader.read(2000)
        writer.close()
        return sent, answer

    sent, answer = asyncio.run(chunked())
    assert answer.startswith(b"HTTP/1.1 413") and sent < 120
    assert memory(service.process) - before < 120


def test_a_slow_client_is_disconnected_and_others_are_answered(service):
    async def slow():
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", int(service.url.rsplit(":", 1)[1])
        )
        writer.write(
            b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: image/png\r\ncontent-length: 1000\r\n\r\n"
        )
        start = time.perf_counter()
        for _ in range(4):
            writer.write(b"x")
            await asyncio.sleep(0.2)
        assert post(service.url + "/predict", encode(RAMP))[0] == 200
        answer = await reader.read(2000)
        writer.close()
        return answer, time.perf_counter() - start

    answer, seconds = asyncio.run(slow())
    assert answer.startswith(b"HTTP/1.1 408") and seconds < 5


def test_every_answer_has_the_headers(service):
    for path in ("/", "/page.js", "/docs", "/model", "/livez"):
        with urllib.request.urlopen(service.url + path) as r:
            policy = r.headers["content-security-policy"]
            assert "script-src 'self'" in policy and "unsafe" not in policy
            assert r.headers["x-content-type-options"] == "nosniff"
            assert r.headers["x-frame-options"] == "DENY"
            assert "server" not in r.headers


def test_logs_name_no_file_and_no_person(brightness):
    named = in_study(PatientName="Doe^Jane", PatientID="4711")
    form = form_of(named, filename="Doe_Jane.dcm")
    dicom = "application/dicom"
    with running(brightness, drain_seconds=0.1) as s:
        assert post(s.url + "/predict", form, FORM)[0] == 200
        assert post(s.url + "/predict?patient=Doe", form, FORM)[0] == 422
        assert post(s.url + "/predict", named, dicom, Accept=dicom)[0] == 200
        post(s.url + "/Doe_Jane", b"x")
        time.sleep(0.2)
        text = s.log.read_text()
    assert "Doe" not in text and "4711" not in text and "127.0.0.1" not in text.split("\n", 1)[1]
    assert all(json.loads(line)["event"] for line in text.splitlines())


# --- Hostile files, and who may ask ---


def asked(s, method, path, body=None, **headers):
    "(status, headers, body) of a request with exactly these headers"
    connection = http.client.HTTPConnection(s.url.removeprefix("http://"), timeout=60)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, named)
    response = connection.getresponse()
    answer = response.status, dict(response.getheaders()), response.read()
    connection.close()
    return answer


HOSTILE = [
    "jp2 box of length 0",
    "j2k truncated",
    "jpeg 5000 segments",
    "jpeg odd exif",
    "png bomb",
    "png palette missing",
    "png text bomb",
    "dicom rows 30000 values",
    "dicom bits 2 values",
    "dicom 5000 sequences deep",
    "dicom rle bomb",
    "dicom jpeg-ls",
    "dicom 1000 frames",
]


def test_hostile_files_are_rejected_and_the_next_image_is_answered(brightness):
    contents = hostile.hostile_files()
    with running(brightness, answer_seconds=20.0, drain_seconds=0.1) as s:
        before = hostile.memory(s.process.pid)
        for name in HOSTILE:
            status, body = post(s.url + "/predict", contents[name], "application/dicom")
            assert status in (200, 415, 422, 503), (name, status, body)
        for name, request in hostile.hostile_requests("brightness", 32).items():
            path, kind, content, headers = request
            if len(content) < 10**7:
                headers = {key: value.encode() for key, value in headers.items()}
                assert 400 <= post(s.url + path, content, kind, **headers)[0] < 500, name
        assert post(s.url + "/predict", encode(RAMP))[0] == 200
        assert urllib.request.urlopen(s.url + "/readyz").status == 200
        assert hostile.memory(s.process.pid) - before < 150


def test_poison_files_stop_neither_the_service_nor_its_end(brightness):
    "Twice as many files as decoders, each of which takes longer than an answer may; and again at SIGTERM"
    content = hostile.slow_film()
    with running(brightness, answer_seconds=1.0, stop_seconds=2, drain_seconds=0.1) as s:

        def attack():
            with contextlib.suppress(OSError):
                return post(s.url + "/predict", content)[0]

        with ThreadPoolExecutor(8) as pool:
            statuses = [job.result() for job in [pool.submit(attack) for _ in range(4)]]
            assert set(statuses) <= {200, 422, 503}
            late = [post(s.url + "/predict", encode(RAMP))[0] for _ in range(3)]
            assert late[-1] == 200
            assert asked(s, "GET", "/livez")[0] == 200
            attacks = [pool.submit(attack) for _ in range(4)]
            time.sleep(0.3)
            s.process.send_signal(signal.SIGTERM)
            assert s.process.wait(10) == 0
            for job in attacks:
                job.result()


def test_a_decoder_stops_when_its_client_has_gone(brightness):
    with running(brightness, decoders=1, drain_seconds=0.1) as s:
        request = request_bytes(hostile.slow_film())
        for _ in range(4):
            with socket.create_connection(("127.0.0.1", int(s.url.rsplit(":", 1)[1]))) as client:
                client.sendall(request)
                time.sleep(0.3)
        assert post(s.url + "/predict", encode(RAMP))[0] == 200


def test_only_the_own_name_and_page_may_ask(service):
    for host in ("localhost", "127.0.0.1:1", "[::1]:8000", "LOCALHOST."):
        assert asked(service, "GET", "/model", host=host)[0] == 200, host
    for host in ("rebound.example", "10.0.0.5:8000", "localhost.evil.example", ""):
        assert asked(service, "GET", "/model", host=host)[0] == 421, host
    own = dict(host="localhost:9", origin="http://localhost:9")
    assert asked(service, "GET", "/model", **own)[0] == 200
    for origin in ("http://evil.example", "null", "http://localhost:8"):
        answer = asked(service, "POST", "/predict", encode(RAMP), host="localhost:9", origin=origin)
        assert answer[0] == 403, origin
    status, headers, _ = asked(service, "GET", "/model/", host="localhost")
    assert status == 404 and "location" not in {name.lower() for name in headers}


def test_head_is_answered_as_get_without_a_body(service):
    for path in ("/", "/livez", "/readyz", "/model", "/metrics", "/v2/models/brightness", "/no"):
        got, head = asked(service, "GET", path), asked(service, "HEAD", path)
        assert (head[0], head[2]) == (got[0], b"")
        assert head[1]["content-type"] == got[1]["content-type"]
    assert asked(service, "HEAD", "/predict")[0] == 405


def raw_answers(service, *parts):
    "The statuses that one connection answers to these bytes, sent one part after the other"
    port = int(service.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        for part in parts:
            client.sendall(part)
            time.sleep(0.05)
        received = b"".join(iter(lambda: client.recv(65536), b""))
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3})", received)]


def upload(*lines):
    "A request to /predict with these lines in its header"
    content = encode(RAMP)
    length = f"Content-Length: {len(content)}"
    header = ["POST /predict HTTP/1.1", "Host: localhost", "Content-Type: image/jpeg", length]
    return "\r\n".join([*header, *lines, "", ""]).encode(), content


def test_an_offer_of_another_protocol_costs_neither_body_nor_connection(service):
    last = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    for protocol in ("h2c", "websocket", "TLS/1.3"):
        offer = ["Connection: Upgrade, HTTP2-Settings", f"UPGRADE: {protocol}", "HTTP2-Settings: A"]
        header, content = upload(*offer)
        get = "\r\n".join(["GET /model HTTP/1.1", "Host: localhost", *offer, "", ""]).encode()
        assert raw_answers(service, header + content, last) == [200, 200]
        assert raw_answers(service, header, content, last) == [200, 200]
        assert raw_answers(service, get, header + content, last) == [200, 200, 200]
        assert raw_answers(service, get + last) == [200, 200]


def test_an_offer_of_another_protocol_may_arrive_in_parts(service):
    last = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    header, content = upload("Connection: Upgrade", "Upgrade: h2c")
    near = header.index(b"Upgrade: h2c")
    ends = range(len(header) - 4, len(header) + 1)
    for at in (header.index(b"\n"), near - 1, near, near + 3, near + 8, near + 10, *ends):
        assert raw_answers(service, header[:at], header[at:] + content, last) == [200, 200]
    small = [header[i : i + 7] for i in range(0, len(header), 7)]
    assert raw_answers(service, *small, content, last) == [200, 200]


def test_a_request_has_one_host(service):
    for hosts in (("localhost", "rebound.example"), ("rebound.example", "localhost")):
        lines = [f"Host: {host}" for host in hosts]
        request = "\r\n".join(["GET /livez HTTP/1.1", *lines, "Connection: close", "", ""])
        assert raw_answers(service, request.encode()) == [400]


def test_a_body_that_looks_like_a_header_arrives_unchanged(service):
    content = encode(RAMP) + b"\r\nUpgrade: h2c\r\n\r\nUpgrade: h2c\r\n\r\n"
    sent = json.loads(post(service.url + "/predict", content)[1])["image"]
    assert sent["sha256"] == sha256(content)


def test_old_clients_may_leave_out_the_name_of_the_service(service):
    for path in ("/livez", "/model"):
        assert raw_answers(service, f"GET {path} HTTP/1.0\r\n\r\n".encode()) == [200]
        other = f"GET {path} HTTP/1.0\r\nHost: rebound.example\r\n\r\n".encode()
        assert raw_answers(service, other) == [421]
    assert raw_answers(service, b"GET /livez HTTP/1.1\r\nConnection: close\r\n\r\n") == [421]


def test_dicom_json_is_not_taken_for_dicom(service):
    film = in_study()
    for accept in ("application/dicom+json", "application/dicom+xml, */*"):
        answer = post(service.url + "/predict", film, "application/dicom", Accept=accept.encode())
        assert answer[0] == 200 and json.loads(answer[1])["image"]["format"] == "DICOM"


def test_compressed_requests_and_long_headers_are_refused(service):
    compressed = dict(content_encoding="gzip", content_type="image/jpeg")
    status, headers, _ = asked(service, "POST", "/predict", b"x", **compressed)
    assert status == 415 and headers["accept-encoding"] == "identity"
    for many in (dict(a="a" * 20_000), {f"a{i}": "a" for i in range(2000)}):
        assert asked(service, "GET", "/livez", **many)[0] == 431
    assert asked(service, "GET", "/livez", a="a" * 8000)[0] == 200


def test_the_model_has_the_one_version_that_its_metadata_name(service):
    place = "/v2/models/brightness"
    for part in ("", "/ready"):
        assert asked(service, "GET", f"{place}/versions/0{part}")[0] == 200
        status, _, body = asked(service, "GET", f"{place}/versions/1{part}")
        assert status == 404 and "only the version 0" in json.loads(body)["error"]
    tensor = dict(name="image", shape=[1, 1, 32, 32], datatype="UINT8", data=[0] * 1024)
    body = json.dumps(dict(inputs=[tensor]))
    assert asked(service, "POST", f"{place}/versions/0/infer", body)[0] == 200


def test_slow_and_idle_connections_keep_nobody_out(brightness):
    "200 of them, at a service that may open 160 descriptors"
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (160, limit[1]))
    try:
        stack = contextlib.ExitStack()
        s = stack.enter_context(running(brightness, drain_seconds=0.1))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)

    async def attack():
        port = int(s.url.rsplit(":", 1)[1])
        kinds = ("idle", "header", "body")
        slow = [asyncio.create_task(hostile.slow_socket(port, kinds[i % 3])) for i in range(200)]
        await asyncio.sleep(2)
        statuses = [
            (await hostile.ask(s, "/predict", "image/jpeg", encode(RAMP), {}))[0] for _ in range(3)
        ]
        for task in slow:
            task.cancel()
        return statuses

    with stack:
        assert asyncio.run(attack()) == [200] * 3
        assert asked(s, "GET", "/readyz")[0] == 200


def test_a_full_service_refuses_at_once_and_the_connection_goes_on(brightness):
    "The 429 comes before the body, which is dropped; the next request is answered or the connection ends"

    async def ask(port):
        head, _, body = request_bytes(encode(RAMP)).partition(b"\r\n\r\n")
        half = head + b"\r\n\r\n" + body[: len(body) // 2]
        places = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        for _, writer in places:
            writer.write(half)
        await asyncio.sleep(0.2)
        found = []
        for closing in (False, True):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(
                half.replace(b"\r\n", b"\r\nconnection: close\r\n", 1) if closing else half
            )
            refused = await exchange(reader, writer, b"")
            assert refused[0] == 429 and b"x-content-type-options: nosniff" in refused[1]
            assert b"Retry-After" in refused[2] and b"retry-after" in refused[1]
            writer.write(body[len(body) // 2 :])
            if closing:
                found.append(await reader.read() == b"")
            else:
                livez = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n"
                found.append((await exchange(reader, writer, livez))[0] == 200)
            writer.close()
        for reader, writer in places:
            found.append((await exchange(reader, writer, body[len(body) // 2 :]))[0] == 200)
            writer.close()
        return found

    limits = dict(workers=1, decoders=1, queue=0, slow_bytes=0)  # Slow uploads keep their places
    with running(brightness, drain_seconds=0.1, **limits) as s:
        assert asyncio.run(ask(int(s.url.rsplit(":", 1)[1]))) == [True] * 4
        counted = urllib.request.urlopen(s.url + "/metrics").read().decode()
        assert 'cxr_requests_total{method="POST",route="other",status="429"} 2.0' in counted


class FakeConnection:
    "What a listener asks of a connection"

    settings = Settings()

    def __init__(self, connections, overdue):
        self.connections, self.late = connections, overdue

    def connection_made(self, transport):
        self.transport = transport
        self.connections.add(self)

    def connection_lost(self, error):
        self.connections.discard(self)

    def overdue(self):
        return self.late

    def rate(self):
        return 1e9


@pytest.mark.parametrize("overdue, expected", ((-1.0, (10, 10, 0)), (1.0, (30, 10, 20))))
@pytest.mark.parametrize("new_loop", (asyncio.new_event_loop, uvloop.new_event_loop))
def test_connections_are_accepted_in_one_turn_as_far_as_there_is_room(new_loop, overdue, expected):
    "(made, open, closed by us) of 30 connections where 10 have room; those that do not wait stay"
    connections, made = set(), []

    def connect():
        made.append(FakeConnection(connections, overdue))
        return made[-1]

    async def run():
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            listener = _Listener(bound, connect, connections, 10)
            clients = [socket.create_connection(bound.getsockname()) for _ in range(30)]
            await asyncio.sleep(0.3)
            found = len(made), len(connections), sum(c.transport.is_closing() for c in made)
            for client in clients:
                client.close()
            await asyncio.sleep(0.3)
            listener.close()
            assert len(made) == 30 and not connections
            return found

    loop = new_loop()
    try:
        assert loop.run_until_complete(run()) == expected
    finally:
        loop.close()


def test_large_uploads_stay_within_their_memory(brightness):
    "Twenty uploads of 20 MB, where 100 MB may arrive at once"
    content = bytes(20_000_000)
    with running(brightness, buffered=100_000_000, drain_seconds=0.1) as s:
        before = memory(s.process)
        with ThreadPoolExecutor(20) as pool:
            jobs = [pool.submit(post, s.url + "/predict", content, "image/png") for _ in range(20)]
            peak = before
            while not all(job.done() for job in jobs):
                peak = max(peak, memory(s.process))
                time.sleep(0.01)
        assert {job.result()[0] for job in jobs} <= {415, 429}
        assert peak - before < 150


def test_a_client_that_does_not_read_its_answers_is_cut_off(brightness):
    request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with (
        running(brightness, receive_seconds=1.0, drain_seconds=0.1) as s,
        socket.socket() as client,
    ):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(10)
        client.connect(("127.0.0.1", int(s.url.rsplit(":", 1)[1])))
        client.sendall(request * 900)
        time.sleep(3)
        with pytest.raises(ConnectionError):
            while True:
                client.sendall(request)
                time.sleep(0.01)
        assert asked(s, "GET", "/livez")[0] == 200


def test_a_structured_report_of_an_odd_header_is_never_a_failure(service):
    rng = np.random.default_rng(0)
    for _ in range(20):
        content = hostile.odd_header(rng)
        kind = "application/dicom"
        status, body = post(service.url + "/predict", content, kind, Accept=kind)
        assert status in (200, 422), (status, body)


@pytest.mark.parametrize("name", ["Doe^Jane^^^^^L", "Doe^Jane^^^^^^", "Doe^Jane"])
def test_a_report_takes_names_of_hl7_and_the_issuer_of_the_patients_number(service, name):
    elements = dict(PatientName=name, ReferringPhysicianName=name, IssuerOfPatientID="Ward 7")
    film = in_study(PatientID="4711", **elements)
    kind = "application/dicom"
    status, body = post(service.url + "/predict", film, kind, Accept=kind)
    report = pydicom.dcmread(io.BytesIO(body))
    assert status == 200 and report.IssuerOfPatientID == "Ward 7" and report.PatientID == "4711"
    assert report.PatientName == report.ReferringPhysicianName == "Doe^Jane"


def test_serve_says_in_a_sentence_why_it_cannot_start(cli, brightness):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = cli("serve", brightness, "--port", taken.getsockname()[1], check=False, timeout=60)
    assert done.returncode == 2 and "another program listens there" in done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    unknown = ("--host", "no.such.host.invalid", "--open-to-all")
    done = cli("serve", brightness, *unknown, check=False, timeout=60)
    assert done.returncode == 2 and "no such address" in done.stderr
    done = cli("serve", brightness / "none", check=False, timeout=60)
    assert done.returncode == 2 and "There is no bundle" in done.stderr


# --- Token ---


def status_with(s, token=None):
    "Status of a prediction with this token"
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return post(s.url + "/predict", encode(RAMP), **headers)[0]


def test_a_token_is_needed_where_others_can_reach_the_service(brightness):
    with running(brightness, token="a-token-of-16-letters", drain_seconds=0.1) as s:
        assert status_with(s) == 401
        assert status_with(s, "wrong-wrong-wrong-") == 401
        assert status_with(s, "a-token-of-16-letters") == 200
        for written in ("bearer a-token-of-16-letters", "BEARER  a-token-of-16-letters"):
            assert post(s.url + "/predict", encode(RAMP), Authorization=written)[0] == 200
        assert b"Choose an image" in urllib.request.urlopen(s.url + "/").read()
    with running(brightness, host="0.0.0.0", drain_seconds=0.1) as s:
        created = re.search(r"#token=([\w-]+)", s.log.read_text())[1]
        logged = [line for line in s.log.read_text().splitlines() if line.startswith("{")]
        assert logged and created not in "".join(logged)
        assert status_with(s) == 401
        assert status_with(s, created) == 200
    with running(brightness, host="0.0.0.0", open_to_all=True, drain_seconds=0.1) as s:
        assert status_with(s) == 200


# --- Load ---


def test_overload_loses_nothing_and_health_checks_stay_quick(brightness):
    "Ten times the clients that fit: every request is answered with 200 or 429, and health checks are quick"
    requests = [request_bytes(encode(RAMP)), form_bytes(encode(RAMP, "PNG"))]

    async def health(url, times):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        while True:
            start = time.perf_counter()
            status, _, _ = await exchange(
                reader, writer, b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n"
            )
            times.append((status, time.perf_counter() - start))
            await asyncio.sleep(0.05)

    async def overload(url):
        times = []
        checking = asyncio.create_task(health(url, times))
        rows = await load(url, requests, clients=100, seconds=4.0)
        checking.cancel()
        return rows, times

    with running(brightness, workers=1, queue=8, drain_seconds=0.2) as s:
        rows, times = asyncio.run(overload(s.url))
    result = summary(rows)
    assert set(result["statuses"]) == {200, 429}, result
    assert {status for status, _ in times} == {200}
    assert np.median([t for _, t in times]) < 0.1, result


def test_sigterm_finishes_the_requests_in_progress(brightness):
    async def stopped(s):
        work = asyncio.create_task(
            load(s.url, [request_bytes(encode(RAMP))], clients=16, seconds=6.0)
        )
        await asyncio.sleep(1.0)
        s.process.send_signal(signal.SIGTERM)
        signalled = time.perf_counter()
        return [row for row in await work if row[0] < signalled + 0.3]

    with running(brightness, drain_seconds=1.0) as s:
        rows = asyncio.run(stopped(s))
        assert s.process.wait(20) == 0
        last = json.loads(s.log.read_text().splitlines()[-1])
    assert len(rows) > 20 and {r[2] for r in rows} <= {200, 429} and last["event"] == "stopped"


def test_memory_does_not_grow(brightness):
    with running(brightness, drain_seconds=0.1) as s:
        requests = [request_bytes(encode(RAMP)), form_bytes(in_study())]
        asyncio.run(load(s.url, requests, clients=8, seconds=3.0))
        before = memory(s.process)
        asyncio.run(load(s.url, requests, clients=8, seconds=float(os.environ.get("CXR_SOAK", 5))))
        assert memory(s.process) - before < 15


# --- The OpenAPI document ---


def test_a_decision_and_its_verdict_are_described_apart(service):
    "The example network decides PNEUMONIA for an image whose conformal set holds NORMAL alone"
    grey = shade(113)  # Its logit is -1.1
    (answer,) = answers_for(service.url, [encode(grey, "PNG")])
    assert (answer["decision"], answer["verdict"]) == ("PNEUMONIA", "NORMAL")
    assert not answer["abstains"]
    openapi = json.load(urllib.request.urlopen(service.url + "/openapi.json"))
    described = openapi["components"]["schemas"]["Answer"]["properties"]
    assert "operating_point" in described["decision"]["description"]
    assert "can therefore differ from `decision`" in described["verdict"]["description"]


def test_the_service_does_what_its_openapi_document_says(tmp_path):
    "Generated requests against every operation; all checks of schemathesis"
    schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis")
    from hypothesis import HealthCheck, settings
    from hypothesis import strategies as st

    tiny = RAMP[:16, ::20]
    content = st.sampled_from([encode(tiny), encode(tiny, "PNG"), to_dicom(tiny)])
    for kind in ("image/jpeg", "image/png", "application/dicom"):
        schemathesis.openapi.media_type(kind, content)
    schemathesis.openapi.format("binary", content)
    cases = int(os.environ.get("CXR_CASES", 25))
    with running(example_bundle(tmp_path / "b", size=8), drain_seconds=0.1) as s:
        schema = schemathesis.openapi.from_url(s.url + "/openapi.json")
        operations = [o.ok() for o in schema.get_all_operations()]
        assert len(operations) >= 12
        for operation in operations:
            for mode in (
                schemathesis.GenerationMode.POSITIVE,
                schemathesis.GenerationMode.NEGATIVE,
            ):
                drive(schemathesis, operation, mode, cases, settings, HealthCheck)


def drive(schemathesis, operation, mode, cases, settings, HealthCheck):
    from hypothesis import given
    from hypothesis.errors import Unsatisfiable

    @settings(
        max_examples=cases,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=True,
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case):
        case.call_and_validate()

    try:
        check()
    except Unsatisfiable:
        pass  # An operation without parameters has no wrong requests


def test_an_existing_client_of_the_inference_protocol_works(service):
    triton = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
    client = triton.InferenceServerClient(service.url.removeprefix("http://"))
    assert (
        client.is_server_live() and client.is_server_ready() and client.is_model_ready("brightness")
    )
    grey = np.full((2, 1, 32, 32), 128, np.uint8)
    for binary in (False, True):
        tensor = triton.InferInput("image", grey.shape, "UINT8")
        tensor.set_data_from_numpy(grey, binary_data=binary)
        output = triton.InferRequestedOutput("logit", binary_data=False)
        result = client.infer("brightness", [tensor], outputs=[output])
        assert np.allclose(result.as_numpy("logit"), [[128 / 255 * 20 - 10]] * 2, atol=1e-4)


# --- Damaged files ---


def mutated(content, rng):
    "A damaged copy: bytes changed, cut, repeated or moved"
    x = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        kind, at = rng.integers(5), int(rng.integers(max(1, len(x))))
        if kind == 0:
            x[at : at + 1] = bytes([rng.integers(256)])
        elif kind == 1:
            del x[at : at + int(rng.integers(1, 200))]
        elif kind == 2:
            x[at:at] = x[at : at + int(rng.integers(1, 200))]
        elif kind == 3:
            x[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"])
        else:
            del x[at:]
    return bytes(x)


def test_damaged_files_are_answered_or_rejected(service):
    n, rng = int(os.environ.get("CXR_FUZZ", 300)), np.random.default_rng(0)
    seeds = [
        encode(RAMP[:64, :64]),
        encode(RAMP[:64, :64], "PNG"),
        encode(Image.fromarray(RAMP[:64, :64]).convert("RGB"), progressive=True),
        to_dicom(RAMP[:64, :64]),
        to_dicom(
            RAMP[:64, :64].astype(np.uint16) * 16, syntax="1.2.840.10008.1.2.4.90", BitsStored=12
        ),
        encode(RAMP[:64, :64].astype(np.uint16), "PNG"),
    ]
    before, statuses = memory(service.process), {}
    for i in range(n):
        content = mutated(seeds[i % len(seeds)], rng)
        status, body = post(service.url + "/predict", content, "application/dicom")
        statuses[status] = statuses.get(status, 0) + 1
        assert status in (200, 400, 413, 415, 422), (status, body)
    print(statuses)
    assert (
        post(service.url + "/predict", seeds[0])[0] == 200
        and memory(service.process) - before < 100
    )


# --- The page ---


def browser():
    "A browser through playwright: its own chromium or the system's"
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = next(
        (p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None
    )
    return api, dict(executable_path=path) if path else {}


@pytest.fixture(scope="module")
def visit(service):
    "A function that opens the page in a fresh browser context"
    api, where = browser()
    with api.sync_playwright() as p:
        try:
            chromium = p.chromium.launch(args=["--no-sandbox"], **where)
        except api.Error as e:
            pytest.skip(f"no browser: {str(e).splitlines()[0]}")
        errors = []

        def open_page(url=service.url, **how):
            page = chromium.new_context(**how).new_page()
            page.on("pageerror", lambda e: errors.append(str(e)))
            page.on(
                "console",
                lambda m: (
                    errors.append(m.text)
                    if m.type == "error" and "Failed to load resource" not in m.text
                    else None
                ),
            )
            page.goto(url)
            page.locator("#model", has_text="version").wait_for()
            return page

        yield open_page
        chromium.close()
        assert not errors


def send(page, name, content):
    page.set_input_files(
        "#file", dict(name=name, mimeType="application/octet-stream", buffer=content)
    )


def test_page_shows_the_answer_the_heat_map_and_the_session(visit):
    page = visit()
    send(page, "=cmd.jpeg", encode(CLEAR))
    page.wait_for_selector("#result:not([hidden])")
    assert "of 100" in page.inner_text("#frequency").lower() and not page.is_checked("#heat")
    assert page.inner_text("#name") == "=cmd.jpeg"
    assert page.evaluate("[canvas.width, canvas.height]") == [320, 240]
    plain = page.evaluate("document.getElementById('canvas').toDataURL()")
    page.check("#heat")
    assert page.evaluate(
        "document.getElementById('canvas').toDataURL()"
    ) != plain and page.is_visible("#legend")
    page.check("#invert")
    page.fill("#zoom", "300")
    assert page.evaluate("document.getElementById('canvas').style.width") == "300%"
    with page.expect_download() as download:
        page.click("#csv")
    text = Path(download.value.path()).read_text()
    assert "'=cmd.jpeg" in text and "Not for clinical use" in text
    for start in "=+-@\t\r":
        assert page.evaluate(f"csvCell({start + 'a'!r})").startswith("\"'" + start)


def test_page_names_the_verdict_where_it_differs_from_the_decision(visit):
    page = visit()
    send(page, "a.png", encode(shade(113), "PNG"))
    page.wait_for_selector("#result:not([hidden])")
    assert page.inner_text("#conclusion").startswith("Above the screening threshold of 0.30: 3")
    assert "Most images with this number show no pneumonia" in page.inner_text("#sureness")
    assert "compatible with NORMAL alone" in page.inner_text("#point")
    send(page, "b.png", encode(shade(239), "PNG"))
    page.locator("#status", has_text="Done.").wait_for()
    assert "alone" not in page.inner_text("#point")


def test_page_speaks_of_the_classes_of_the_network(visit, tmp_path):
    names = ('kein "Befund"', "<b>Tb</b>")
    bundle = example_bundle(tmp_path / "other", size=32, classes=names)
    with running(bundle, drain_seconds=0.2) as other:
        page = visit(other.url)
        assert page.inner_text("h1") == "<b>Tb</b> on a chest radiograph"
        for name, grey in dict(high=113, higher=239, low=20).items():
            send(page, f"{name}.png", encode(shade(grey), "PNG"))
            page.locator("#name", has_text=f"{name}.png").wait_for()
            page.locator("#status", has_text="Done.").wait_for()
            if name == "high":
                assert "show no <b>Tb</b>" in page.inner_text("#sureness")
                assert f"compatible with {names[0]} alone" in page.inner_text("#point")
            page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert names[name != "low"] in page.inner_text("#details")
            text = page.inner_text("main").replace(
                "recognise pneumonia", ""
            )  # In the example's limits
            assert "pneumonia" not in text.lower() and "NORMAL" not in text
        page.fill("#prevalence", "1")
        page.locator("#status", has_text="share of <b>Tb</b>").wait_for()


def test_page_withholds_the_number_of_an_unfamiliar_image_until_asked(visit):
    page = visit()
    send(page, "photo.png", encode(np.dstack([RAMP, RAMP // 2, 255 - RAMP]), "PNG"))
    page.wait_for_selector("#result:not([hidden])")
    assert page.inner_text("#conclusion") == "No answer: a person needs to read this image"
    assert "colour" in page.inner_text("#warning")
    for number in ("#number", "#scale", "#frequency", "#heat"):
        assert not page.is_visible(number)
    assert "%" not in page.inner_text("#rows")
    page.click("#ask")
    assert page.is_visible("#scale") and page.is_visible("#heat")
    assert "in 100" in page.inner_text("#conclusion")


def test_page_follows_the_prevalence_and_takes_several_files(visit):
    page = visit()
    files = [
        dict(name=f"{i}.png", mimeType="image/png", buffer=encode(shade(180 + 20 * i), "PNG"))
        for i in range(3)
    ]
    page.set_input_files("#file", files)
    page.locator("#rows tr").nth(2).wait_for()
    page.locator("#name", has_text="2.png").wait_for()
    usual = page.inner_text("#frequency")
    page.fill("#prevalence", "1")
    page.locator("#frequency", has_text="if 1 of 100").wait_for()
    assert page.inner_text("#frequency") != usual
    assert page.locator("#rows tr").count() == 3


def test_page_answers_dicom_and_says_what_is_wrong(visit):
    page = visit()
    send(page, "a.dcm", to_dicom(RAMP))
    page.wait_for_selector("#result:not([hidden])")
    send(page, "b.txt", b"not an image")
    page.wait_for_selector("#error:not([hidden])")
    assert "neither JPEG nor PNG nor DICOM" in page.inner_text("#error") and not page.is_visible(
        "#result"
    )
    assert page.locator("#rows tr").count() == 2


def file_chooser_by_key(page):
    "The file chooser that the space bar opens, which is tried again because a busy browser may let a key press expire"
    import playwright.sync_api

    for last in (False, False, True):
        try:
            with page.expect_file_chooser(timeout=10_000) as chooser:
                page.keyboard.press("Space")
            return chooser.value
        except playwright.sync_api.TimeoutError:
            if last:
                raise


def test_page_works_with_the_keyboard_alone(visit):
    page = visit()
    page.bring_to_front()
    for _ in range(3):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "file":
            break
    assert page.evaluate("document.activeElement.id") == "file"
    chooser = file_chooser_by_key(page)
    chooser.set_files(dict(name="a.png", mimeType="image/png", buffer=encode(CLEAR, "PNG")))
    page.wait_for_selector("#result:not([hidden])")
    assert page.evaluate("document.activeElement.id") == "conclusion"
    reached = []
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    controls = {"heat", "opacity", "centre", "width", "zoom", "invert", "square", "reset"}
    assert {"frame"} | controls <= set(reached)
    page.focus("#heat")
    page.keyboard.press("Space")
    assert page.is_checked("#heat")


@pytest.fixture(scope="module")
def axe():
    "The script of axe-core, from npm; it is not part of the repository"
    place = Path(os.environ.get("CXR_AXE", ""))
    if place.is_file():
        return place.read_text()
    npm = shutil.which("npm")
    if not npm:
        pytest.skip("needs npm for axe-core")
    folder = Path(tempfile.mkdtemp())
    subprocess.run(
        [npm, "install", "--silent", "--prefix", str(folder), "axe-core@4"],
        capture_output=True,
        text=True,
        timeout=180,
    )
    script = folder / "node_modules/axe-core/axe.min.js"
    if not script.exists():
        pytest.skip("axe-core cannot be installed from npm")
    return script.read_text()


@pytest.mark.parametrize(
    "how",
    [
        dict(color_scheme="light"),
        dict(color_scheme="dark"),
        dict(viewport=dict(width=360, height=740)),
    ],
    ids=["light", "dark", "small"],
)
def test_page_has_no_axe_violations(visit, axe, how):
    page, script = visit(bypass_csp=True, **how), axe
    send(page, "a.jpeg", encode(CLEAR))
    page.wait_for_selector("#result:not([hidden])")
    page.check("#heat")
    page.click("#about summary")
    page.click("#result > details summary")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.add_script_tag(content=script)
    violations = page.evaluate("axe.run()")["violations"]
    page.goto(page.url + "docs")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.add_script_tag(content=script)
    violations += page.evaluate("axe.run()")["violations"]
    assert not violations, [(v["id"], [n["html"][:80] for n in v["nodes"]]) for v in violations]


# --- The command line ---


def commands():
    return subprocess.run([COMMAND, "--help"], capture_output=True, text=True).stdout


@pytest.mark.skipif(" predict " not in commands(), reason="this command line has no predict")
def test_predict_continues_an_interrupted_table(cli, brightness, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out.csv"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.png").write_bytes(encode((RAMP * (i / 6)).astype(np.uint8), "PNG"))
    (folder / "broken.jpg").write_bytes(encode(RAMP)[:999])
    (folder / "a.dcm").write_bytes(in_study())
    done = cli(
        "predict",
        folder,
        "--out",
        out,
        "--bundle",
        brightness,
        "--dicom-sr",
        tmp_path / "sr",
        check=False,
    )
    assert done.returncode == 1 and "1 failed" in done.stdout + done.stderr
    whole = out.read_text()
    out.write_text("\n".join(whole.splitlines()[:3]) + "\nhalf a li")
    cli("predict", folder, "--out", out, "--bundle", brightness, check=False)
    assert sorted(out.read_text().splitlines()) == sorted(whole.splitlines())
    assert [p.suffix for p in (tmp_path / "sr").iterdir()] == [".dcm"]


@pytest.mark.skipif(" bundle " not in commands(), reason="this command line has no bundle")
def test_bundle_is_a_command(cli, trained, tmp_path):
    run = trained[0]
    cli(
        "bundle",
        run.folder,
        "--out",
        tmp_path / "b",
        "--name",
        "small",
        CXR_CACHE=os.environ["CXR_CACHE"],
    )
    assert load_bundle(tmp_path / "b").name == "small"


def test_a_network_of_other_classes_has_no_structured_reports(cli, tmp_path):
    bundle = example_bundle(tmp_path / "other", classes=("NORMAL", "tb"))
    (tmp_path / "film.dcm").write_bytes(in_study())
    out = ["--bundle", bundle, "--out", tmp_path / "out.csv"]
    done = cli("predict", tmp_path / "film.dcm", *out, "--dicom-sr", tmp_path / "sr", check=False)
    assert done.returncode == 2 and "distinguishes NORMAL from tb" in done.stderr
    assert not (tmp_path / "out.csv").exists() and not (tmp_path / "sr").exists()
    cli("predict", tmp_path / "film.dcm", *out)
