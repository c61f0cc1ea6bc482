"""The service as a real process on 127.0.0.1: parity, bad input, overload, a slow client, SIGTERM, its contract, damaged files, and the page in a real browser.

CXR_FUZZ=20000 sets the number of damaged files (300 without it), CXR_CASES=500 the number of generated requests an operation (25).
"""

import asyncio
import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import COMMAND, ROOT
from PIL import Image
from pydicom.uid import generate_uid

for needed in ("fastapi", "onnxruntime", "onnx"):
    pytest.importorskip(needed, reason="needs the packages of the extra `serve`, and onnx")

from load_client import exchange, form_bytes, load, post, request_bytes, running, summary

from cxr_study.core.run import Run, sha256
from cxr_study.data.dicom import to_dicom
from cxr_study.serve.bundle import example_bundle, load_bundle

RAMP = np.linspace(0, 255, 320).astype(np.uint8) * np.ones((240, 1), np.uint8)


def encode(x, format="JPEG", **kwargs):
    picture = x if isinstance(x, Image.Image) else Image.fromarray(x)
    picture.save(buffer := io.BytesIO(), format, **kwargs)
    return buffer.getvalue()


def filed(x=RAMP, **elements):
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
    return (
        int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) / 1024
    )


# --- The bundle of a trained network, and parity ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "(run, bundle, images) of a network that was trained for a moment on phantoms"
    torch = pytest.importorskip("torch", reason="needs the packages of the extra `study`")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    folder = tmp_path_factory.mktemp("trained")
    before, os.environ["CXR_CACHE"] = os.environ.get("CXR_CACHE"), str(folder / "cache")
    try:
        yield make_trained(torch, folder)
    finally:
        os.environ.pop("CXR_CACHE") if before is None else os.environ.update(CXR_CACHE=before)


def make_trained(torch, folder):
    from cxr_study.core.run import cache_folder
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


def ask_all(url, contents, path="/predict"):
    "Answers for these files, several at a time"

    def one(content):
        status, body = post(url + path, content, "image/png")
        assert status == 200, body
        return json.loads(body)

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(one, contents))


def check_parity(found, logits, calibration):
    got = np.array([a["logit"] for a in found])
    assert np.abs(got - logits).max() <= 1e-4, (
        f"largest difference {np.abs(got - logits).max():.2g}"
    )
    assert [a["decision"] == "PNEUMONIA" for a in found] == calibration.decide(logits).tolist()


def test_the_service_answers_what_the_run_predicted(trained):
    run, bundle, drawn, images, row = trained
    loaded = load_bundle(bundle)
    assert (
        loaded.facts["parity"]["images_at_hand"]
        and loaded.facts["parity"]["largest_difference"] <= 1e-4
    )
    table = run.read("predictions.csv")
    drawings = [drawn.source(int(row[i])) for i in table.image_id]
    with running(bundle, drain_seconds=0.2) as s:
        found = ask_all(s.url, [encode(x, "PNG") for x in drawings], "/explain")
    check_parity(found, table.logit.to_numpy(), loaded.calibration)
    for a, i in zip(found, table.image_id):
        assert np.array_equal(
            np.asarray(Image.open(io.BytesIO(base64.b64decode(a["seen_png"])))), images[row[i]]
        )


def shipped():
    "(bundle, table of predictions that it was proven against) of a bundle in models/, if both are committed"
    for file in ROOT.glob("models/*/bundle.json"):
        said = json.loads(file.read_text()).get("predictions_sha256")
        for predictions in ROOT.glob("results/*/seed*/predictions.csv"):
            if sha256(predictions) == said:
                return file.parent, predictions
    pytest.skip("there is no bundle in models/ whose predictions are in results/")


def test_the_shipped_bundle_answers_what_was_published(data):
    import pandas as pd

    bundle, predictions = shipped()
    table = pd.read_csv(predictions).query("split == 'test'")
    place = data / "chest_xray"
    if not all((place / i).exists() for i in table.image_id):
        pytest.skip("its images are not at hand")
    with running(bundle, drain_seconds=0.2) as s:

        def one(i):
            status, body = post(s.url + "/predict", (place / i).read_bytes(), "image/jpeg")
            return json.loads(body)

        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(one, table.image_id))
    check_parity(found, table.logit.to_numpy(), load_bundle(bundle).calibration)


def test_a_batch_answers_as_single_pictures_do(service):
    pictures = [encode((RAMP * f).astype(np.uint8)) for f in (0.2, 0.5, 0.9)]
    alone = [json.loads(post(service.url + "/predict", p)[1])["logit"] for p in pictures]
    parts = (
        b"".join(
            b'--x\r\ncontent-disposition: form-data; name="files"; filename="a"\r\n\r\n'
            + p
            + b"\r\n"
            for p in pictures
        )
        + b"--x--\r\n"
    )
    status, body = post(service.url + "/predict/batch", parts, "multipart/form-data; boundary=x")
    assert [r["logit"] for r in json.loads(body)["results"]] == alone


def test_serving_needs_no_torch():
    modules = ("bundle", "predictor", "structured_report", "guard", "service")
    code = (
        "import sys; "
        + "; ".join(f"import cxr_study.serve.{m}" for m in modules)
        + "; sys.exit(bool({'torch', 'pandas', 'fastai', 'sklearn', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_service_opens_no_connection_to_elsewhere(service):
    "No socket of the process leads to an address of another machine, and ONNX Runtime is told to report nothing"
    post(service.url + "/predict", encode(RAMP))
    assert (
        "ORT_DISABLE_TELEMETRY" in (ROOT / "cxr_study/serve/predictor.py").read_text()
        and "telemetry" not in service.log.read_text()
    )
    mine = {os.readlink(f) for f in Path(f"/proc/{service.process.pid}/fd").iterdir()}
    for kind in ("tcp", "udp"):
        for line in Path(f"/proc/{service.process.pid}/net/{kind}").read_text().splitlines()[1:]:
            fields = line.split()
            if f"socket:[{fields[9]}]" in mine:
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
        "text as .jpg": (b"this is no picture", 415, "neither JPEG nor PNG nor DICOM"),
        "truncated": (encode(RAMP)[:2000], 422, "truncated or damaged"),
        "bomb": (big, 422, "at most 40,000,000"),
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
def test_what_cannot_be_used_is_refused_with_a_sentence(service, name):
    content, status, words = bad_files()[name]
    start = time.perf_counter()
    got = post(service.url + "/predict", content, "image/jpeg")
    assert got[0] == status and words in detail(got)
    assert time.perf_counter() - start < 2
    assert not re.search(r"Traceback|/home|/work|/tmp|\.py|Error\b", got[1].decode())
    form = (
        b'--x\r\ncontent-disposition: form-data; name="file"; filename="secret-name.jpg"\r\n\r\n'
        + content
        + b"\r\n--x--\r\n"
    )
    assert post(service.url + "/predict", form, "multipart/form-data; boundary=x")[0] == status


def test_other_ways_to_ask_wrongly(service):
    form = (
        b'--x\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\nabc\r\n--x--\r\n'
    )
    asked = {
        "wrong field": post(service.url + "/predict", form, "multipart/form-data; boundary=x"),
        "no boundary": post(service.url + "/predict", form, "multipart/form-data"),
        "no kind": post(service.url + "/predict", b"abc", "text/plain"),
        "prevalence": post(service.url + "/predict?prevalence=1.5", encode(RAMP)),
        "point": post(service.url + "/predict?point=none", encode(RAMP)),
        "report of a jpeg": post(
            service.url + "/predict", encode(RAMP), Accept="application/dicom"
        ),
    }
    assert {k: a[0] for k, a in asked.items()} == {
        "wrong field": 422,
        "no boundary": 400,
        "no kind": 415,
        "prevalence": 422,
        "point": 422,
        "report of a jpeg": 422,
    }
    assert "fields named `file`" in detail(
        asked["wrong field"]
    ) and "needs a DICOM picture" in detail(asked["report of a jpeg"])


def test_a_colour_photograph_is_answered_and_flagged(service):
    photo = np.dstack([RAMP, RAMP // 2, 255 - RAMP])
    found = json.loads(post(service.url + "/predict", encode(photo))[1])
    assert (
        found["unfamiliar"] is True and found["abstains"] and "colour" in found["unfamiliar_reason"]
    )
    grey_as_rgb = json.loads(
        post(service.url + "/predict", encode(Image.fromarray(RAMP).convert("RGB")))[1]
    )
    assert grey_as_rgb["unfamiliar"] is None and "gate" in grey_as_rgb["unfamiliar_reason"]


def test_fifty_megabytes_are_refused_while_they_arrive(service):
    before = memory(service.process)
    assert post(service.url + "/predict", bytes(50_000_000))[0] == 413

    async def chunked():
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", int(service.url.rsplit(":", 1)[1])
        )
        writer.write(
            b"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-type: image/png\r\ntransfer-encoding: chunked\r\n\r\n"
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


def test_a_slow_client_is_let_go_and_hinders_nobody(service):
    async def slow():
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", int(service.url.rsplit(":", 1)[1])
        )
        writer.write(
            b"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-type: image/png\r\ncontent-length: 1000\r\n\r\n"
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


def test_every_answer_carries_the_headers(service):
    import urllib.request

    for path in ("/", "/page.js", "/docs", "/model", "/livez"):
        with urllib.request.urlopen(service.url + path) as r:
            assert (
                "script-src 'self'" in r.headers["content-security-policy"]
                and "unsafe" not in r.headers["content-security-policy"]
            )
            assert (
                r.headers["x-content-type-options"] == "nosniff"
                and r.headers["x-frame-options"] == "DENY"
                and "server" not in r.headers
            )


def test_logs_name_no_file_and_no_person(brightness):
    with running(brightness, drain_seconds=0.1) as s:
        form = (
            b'--x\r\ncontent-disposition: form-data; name="file"; filename="Doe_Jane.dcm"\r\n\r\n'
            + filed(PatientName="Doe^Jane", PatientID="4711")
            + b"\r\n--x--\r\n"
        )
        assert post(s.url + "/predict", form, "multipart/form-data; boundary=x")[0] == 200
        assert (
            post(s.url + "/predict?patient=Doe", form, "multipart/form-data; boundary=x")[0] == 422
        )
        assert (
            post(
                s.url + "/predict",
                filed(PatientName="Doe", PatientID="4711"),
                "application/dicom",
                Accept="application/dicom",
            )[0]
            == 200
        )
        post(s.url + "/Doe_Jane", b"x")
        time.sleep(0.2)
        text = s.log.read_text()
    assert "Doe" not in text and "4711" not in text and "127.0.0.1" not in text.split("\n", 1)[1]
    assert all(json.loads(line)["event"] for line in text.splitlines())


# --- Token ---


def test_a_token_is_asked_for_where_the_service_can_be_reached(brightness):
    import urllib.request

    with running(brightness, token="a-token-of-16-letters", drain_seconds=0.1) as s:
        assert post(s.url + "/predict", encode(RAMP))[0] == 401
        assert (
            post(s.url + "/predict", encode(RAMP), Authorization="Bearer wrong-wrong-wrong-")[0]
            == 401
        )
        assert (
            post(s.url + "/predict", encode(RAMP), Authorization="Bearer a-token-of-16-letters")[0]
            == 200
        )
        assert b"Choose a picture" in urllib.request.urlopen(s.url + "/").read()
    with running(brightness, host="0.0.0.0", drain_seconds=0.1) as s:
        made = re.search(r"#token=([\w-]+)", s.log.read_text())[1]
        assert post(s.url + "/predict", encode(RAMP))[0] == 401
        assert post(s.url + "/predict", encode(RAMP), Authorization=f"Bearer {made}")[0] == 200
    with running(brightness, host="0.0.0.0", open_to_all=True, drain_seconds=0.1) as s:
        assert post(s.url + "/predict", encode(RAMP))[0] == 200


# --- Load ---


def test_overload_loses_nothing_and_health_stays_quick(brightness):
    "Ten times the clients that fit: every request is answered, with 200 or with 429, and health is asked meanwhile"
    requests = [request_bytes(encode(RAMP)), form_bytes(encode(RAMP, "PNG"))]

    async def health(url, times):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        while True:
            start = time.perf_counter()
            status, _, _ = await exchange(reader, writer, b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n")
            times.append((status, time.perf_counter() - start))
            await asyncio.sleep(0.05)

    async def overload(url):
        times = []
        asking = asyncio.create_task(health(url, times))
        rows = await load(url, requests, clients=100, seconds=4.0)
        asking.cancel()
        return rows, times

    with running(brightness, workers=1, queue=8, drain_seconds=0.2) as s:
        rows, times = asyncio.run(overload(s.url))
    found = summary(rows)
    assert set(found["statuses"]) == {200, 429}, found
    assert {status for status, _ in times} == {200}
    assert np.median([t for _, t in times]) < 0.1, found


def test_sigterm_answers_what_is_in_flight(brightness):
    async def stopped(s):
        work = asyncio.create_task(
            load(s.url, [request_bytes(encode(RAMP))], clients=16, seconds=6.0)
        )
        await asyncio.sleep(1.0)
        s.process.send_signal(signal.SIGTERM)
        told = time.perf_counter()
        return [r for r in await work if r[0] < told + 0.3]

    with running(brightness, drain_seconds=1.0) as s:
        rows = asyncio.run(stopped(s))
        assert s.process.wait(20) == 0
        last = json.loads(s.log.read_text().splitlines()[-1])
    assert len(rows) > 20 and {r[2] for r in rows} <= {200, 429} and last["event"] == "stopped"


def test_memory_does_not_grow(brightness):
    with running(brightness, drain_seconds=0.1) as s:
        pictures = [request_bytes(encode(RAMP)), form_bytes(filed())]
        asyncio.run(load(s.url, pictures, clients=8, seconds=3.0))
        before = memory(s.process)
        asyncio.run(load(s.url, pictures, clients=8, seconds=float(os.environ.get("CXR_SOAK", 5))))
        assert memory(s.process) - before < 15


# --- The contract ---


def test_the_openapi_document_is_kept(tmp_path):
    "Generated requests against every operation; all checks of schemathesis"
    schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis")
    from hypothesis import HealthCheck, settings
    from hypothesis import strategies as st

    tiny = RAMP[:16, ::20]
    picture = st.sampled_from([encode(tiny), encode(tiny, "PNG"), to_dicom(tiny)])
    for kind in ("image/jpeg", "image/png", "application/dicom"):
        schemathesis.openapi.media_type(kind, picture)
    schemathesis.openapi.format("binary", picture)
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
        pass  # An operation without parameters cannot be asked wrongly


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
        found = client.infer(
            "brightness",
            [tensor],
            outputs=[triton.InferRequestedOutput("logit", binary_data=False)],
        )
        assert np.allclose(found.as_numpy("logit"), [[128 / 255 * 20 - 10]] * 2, atol=1e-4)


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


def test_damaged_files_are_answered_or_refused(service):
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

        def open_page(**how):
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
            page.goto(service.url)
            page.wait_for_function(
                "document.getElementById('model').textContent.includes('version')"
            )
            return page

        yield open_page
        chromium.close()
        assert not errors


def send(page, name, content):
    page.set_input_files(
        "#file", dict(name=name, mimeType="application/octet-stream", buffer=content)
    )


def test_page_answers_a_picture_with_heat_map_and_history(visit):
    page = visit()
    send(page, "=cmd.jpeg", encode(RAMP))
    page.wait_for_selector("#result:not([hidden])")
    assert "of 100" in page.inner_text("#frequency").lower() and not page.is_checked("#heat")
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


def test_page_answers_dicom_and_says_what_is_wrong(visit):
    page = visit()
    send(page, "a.dcm", to_dicom(RAMP))
    page.wait_for_selector("#result:not([hidden])")
    send(page, "b.txt", b"no picture")
    page.wait_for_selector("#error:not([hidden])")
    assert "neither JPEG nor PNG nor DICOM" in page.inner_text("#error") and not page.is_visible(
        "#result"
    )
    assert page.locator("#rows tr").count() == 2


def test_page_works_with_the_keyboard_alone(visit):
    page = visit()
    page.bring_to_front()
    for _ in range(3):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "file":
            break
    assert page.evaluate("document.activeElement.id") == "file"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Space")
    chooser.value.set_files(dict(name="a.png", mimeType="image/png", buffer=encode(RAMP, "PNG")))
    page.wait_for_selector("#result:not([hidden])")
    assert page.evaluate("document.activeElement.id") == "verdict"
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert {"frame", "heat", "opacity", "centre", "width", "zoom", "invert", "reset"} <= set(
        reached
    )
    page.focus("#heat")
    page.keyboard.press("Space")
    assert page.is_checked("#heat")


@pytest.fixture(scope="module")
def axe():
    "The script of axe-core, from npm; it is kept nowhere in the repository"
    place = Path(os.environ.get("CXR_AXE", ""))
    if place.is_file():
        return place.read_text()
    npm = shutil.which("npm")
    if not npm:
        pytest.skip("needs npm for axe-core")
    folder = Path(tempfile.mkdtemp())
    done = subprocess.run(
        [npm, "install", "--silent", "--prefix", str(folder), "axe-core@4"],
        capture_output=True,
        text=True,
        timeout=180,
    )
    script = folder / "node_modules/axe-core/axe.min.js"
    if not script.exists():
        pytest.skip("axe-core cannot be had from npm")
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
    send(page, "a.jpeg", encode(RAMP))
    page.wait_for_selector("#result:not([hidden])")
    page.check("#heat")
    page.click("#about summary")
    page.click("#result > details summary")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.add_script_tag(content=script)
    found = page.evaluate("axe.run()")["violations"]
    page.goto(page.url + "docs")
    page.add_script_tag(content=script)
    found += page.evaluate("axe.run()")["violations"]
    assert not found, [(v["id"], [n["html"][:80] for n in v["nodes"]]) for v in found]


# --- The command line ---


def commands():
    return subprocess.run([COMMAND, "--help"], capture_output=True, text=True).stdout


@pytest.mark.skipif(" predict " not in commands(), reason="this command line has no predict")
def test_predict_goes_on_where_it_was_interrupted(cli, brightness, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out.csv"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.png").write_bytes(encode((RAMP * (i / 6)).astype(np.uint8), "PNG"))
    (folder / "broken.jpg").write_bytes(encode(RAMP)[:999])
    (folder / "a.dcm").write_bytes(filed())
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
    assert done.returncode == 1 and "1 could not be read" in done.stdout + done.stderr
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


@pytest.mark.parametrize("command", ["predict", "serve"])
def test_a_network_of_other_classes_is_not_served_as_one_of_pneumonia(cli, tmp_path, command):
    "Service and `predict` name pneumonia; a bundle of healthy and sick is refused before anything is answered"
    bundle = example_bundle(tmp_path / "other", classes=("healthy", "sick"))
    (tmp_path / "film.png").write_bytes(encode(RAMP))
    args = (
        [tmp_path / "film.png", "--bundle", bundle, "--out", tmp_path / "out.csv"]
        if command == "predict"
        else [bundle, "--port", 8799]
    )
    done = cli(command, *args, check=False, timeout=60)
    assert done.returncode == 2 and "tells healthy from sick" in done.stderr
    assert not (tmp_path / "out.csv").exists()
