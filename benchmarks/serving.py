"""This service beside plain FastAPI services with the same network in PyTorch, and beside LitServe with the same
network: one after the other on the same cores, the client on them too.

usage: serving.py BUNDLE RUN IMAGES [--seconds 20] [--out results/benchmarks/serving.json]      RUN: the run that
the bundle was made from; IMAGES: a folder of JPEG radiographs

Every server gets the same requests (forms with a JPEG of 1320 x 970 pixels) and runs the same network in float32.
The PyTorch servers decode as such services do (Pillow: whole picture, grey, resized);
two more decode through this study's function, which reads JPEGs at a reduced size, and must give the same logits
within 1e-3: they show what is due to the decoding and what to the rest. The PyTorch
servers are tuned as far as a few lines go: inference mode, channels_last for the threads, and threads that do not
fight for the cores.
  plain async      `async def` endpoint, PyTorch's default threads: what most examples do
  plain threads    `def` endpoint in Starlette's thread pool, one thread of PyTorch each, two at a time
  LitServe         two worker processes, one thread of PyTorch each
  LitServe batch   the same, batches of up to 8
Needs torch, litserve and python-multipart beside the service's own packages.
"""

import argparse
import asyncio
import io
import json
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
from load_client import form_bytes, load, running, summary
from PIL import Image

from cxr_study.core.run import Run, hardware, versions

HERE = [sys.executable, __file__]
ROUNDS = 5  # Of each load; the median counts
CLIENTS = (1, 10, 40, 400)


# --- The others ---


def decoder(spec, decode):
    "From bytes to uint8 [size, size]: as such services do (usual), or as this study does (ours)"
    if decode == "ours":
        return spec
    return lambda content: np.asarray(
        Image.open(io.BytesIO(content))
        .convert("L")
        .resize((spec.size,) * 2, Image.Resampling.BILINEAR)
    )


def network(folder, decode, threads=None, channels_last=False):
    "(model, decoder) of a run"
    import torch

    from cxr_study.train.networks import load_model

    if threads:
        torch.set_num_threads(threads)
    model = load_model(Run(folder, verify=False))
    return model.to(memory_format=torch.channels_last) if channels_last else model, decoder(
        model.spec, decode
    )


def logits(model, arrays):
    import torch

    with torch.inference_mode():
        return model(torch.from_numpy(np.stack(arrays))[:, None].float() / 255)[:, 0].tolist()


def plain(folder, port, style, decode):
    "A FastAPI service as in most examples (style async), or with threads that do not fight (style threads)"
    import uvicorn
    from fastapi import FastAPI, UploadFile

    app, two = FastAPI(), threading.Semaphore(2)
    model, spec = network(folder, decode, 1 if style == "threads" else None, style == "threads")
    if style == "async":

        @app.post("/predict")
        async def predict(file: UploadFile):
            return dict(logit=logits(model, [spec(await file.read())])[0])
    else:

        @app.post("/predict")
        def predict(file: UploadFile):
            with two:
                return dict(logit=logits(model, [spec(file.file.read())])[0])

    @app.get("/health")
    def health():
        return "ok"

    uvicorn.run(app, port=port, log_level="warning", access_log=False)


# --- Measuring ---


def pictures(folder, n=16, size=(1320, 970)):
    "JPEGs of 1320 x 970 grey pixels, quality 90, made from radiographs of a folder"
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".jpeg", ".jpg"))
    made = []
    for f in files[:: max(1, len(files) // n)][:n]:
        Image.open(f).convert("L").resize(size, Image.Resampling.LANCZOS).save(
            b := io.BytesIO(), "JPEG", quality=90
        )
        made.append(b.getvalue())
    return made


def resident(pid):
    """Resident memory of a process and its children, MB (shared pages counted once, as far as the kernel shares
    them out: PSS)"""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(text.split("Pss:")[1].split()[0]) / 1024 + sum(resident(c) for c in children)


def rounds(url, forms, clients, seconds):
    "`summary` of all rounds; the requests a second are the median of the rounds"
    rows = [
        asyncio.run(load(url, forms, clients=clients, seconds=seconds / ROUNDS))
        for _ in range(ROUNDS)
    ]
    each = [summary(found)["per_second"] for found in rows]
    together = summary([row for found in rows for row in found])
    return together | dict(per_second=float(np.median(each)), per_second_of_rounds=each)


def stages(rows):  # Of one client, with the bodies
    "Where the time of a request goes: medians in milliseconds"
    parts = dict(decode=[], network=[], decide=[], http=[])
    for _, took, _, body, *_ in rows:
        timing = json.loads(body)["timing_ms"]
        parts["decode"].append(timing["decode"])
        parts["network"].append(timing["network"])
        parts["decide"].append(timing["total"] - timing["decode"] - timing["network"])
        parts["http"].append(1000 * took - timing["total"])
    return {name: round(float(np.median(values)), 2) for name, values in parts.items()}


def curve(how, contents, seconds):
    "Requests a second, times and memory of this service as clients come, each number on a service of its own"
    forms = [form_bytes(c) for c in contents]
    found = []
    for clients in CLIENTS:
        with running(**how) as s:
            rows = asyncio.run(load(s.url, forms, clients=clients, seconds=seconds))
            found.append(dict(clients=clients, resident_mb=round(resident(s.process.pid))))
        found[-1] |= summary(rows)
        print(found[-1], flush=True)
    return found


def measure(name, how, contents, seconds, clients):
    "What one server does, and the logits that it gives"
    forms = [form_bytes(c) for c in contents]
    with running(seconds=120, **how) as s:
        first = asyncio.run(load(s.url, forms, clients=1, seconds=2.0, keep=True))
        answers = {i: json.loads(r[3])["logit"] for i, r in enumerate(first[: len(forms)])}
        single = rounds(s.url, forms, 1, seconds / 2)
        loaded = rounds(s.url, forms, clients, seconds)
        found = dict(
            ready_seconds=round(s.ready_seconds, 2),
            resident_mb=round(resident(s.process.pid)),
            single=single,
            load=loaded,
        )
    if "timing_ms" in json.loads(first[0][3]):
        found["stages_ms"] = stages(first)
    print(
        f"{name:28} {loaded['per_second']:7.1f} requests/s   "
        f"one client p50 {single['answered']['p50']:6.1f} ms p99 {single['answered']['p99']:6.1f} ms   "
        f"{clients} clients p50 {loaded['answered']['p50']:6.1f} ms p99 {loaded['answered']['p99']:6.1f} ms   "
        f"ready {found['ready_seconds']:5.2f} s   {found['resident_mb']:5d} MB   {loaded['statuses']}",
        flush=True,
    )
    return found, answers


def overload(how, contents, seconds, clients=400):
    "Ten times the clients, who come within two seconds and wait as Retry-After says; health is asked meanwhile"

    async def both(url):
        times, stop = [], False

        async def health():
            while not stop:
                start = time.perf_counter()
                await asyncio.to_thread(urlopen, url + "/livez")
                times.append(time.perf_counter() - start)
                await asyncio.sleep(0.2)

        asking = asyncio.create_task(health())
        rows = await load(
            url, [form_bytes(c) for c in contents], clients=clients, seconds=seconds, ramp=2.0
        )
        stop = True
        await asking
        return rows, times

    from urllib.request import urlopen

    with running(**how) as s:
        rows, times = asyncio.run(both(s.url))
    found = summary(rows) | dict(
        health_ms={f"p{q}": round(1000 * float(np.percentile(times, q)), 1) for q in (50, 99)}
    )
    print("overload", found)
    return found


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("bundle", "run", "images"):
        p.add_argument(name)
    p.add_argument("--seconds", type=float, default=20.0)
    p.add_argument("--clients", type=int, default=40)
    p.add_argument("--out")
    p.add_argument("--only", default="", help="names of servers, with ; between them")
    a = p.parse_args()
    contents, run = pictures(a.images), str(Path(a.run).resolve())
    print(
        f"{len(contents)} JPEGs of 1320 x 970, {np.mean([len(c) for c in contents]) / 1000:.0f} kB on average; "
        f"{os.cpu_count()} cores"
    )
    ours = dict(bundle=Path(a.bundle).resolve())

    def plainly(style, decode="usual"):
        return dict(command=[*HERE, "--plain", run, "{port}", style, decode], path="/health")

    def lit(batch, decode="usual"):
        return dict(
            command=[
                sys.executable,
                str(Path(__file__).with_name("serving_litserve.py")),
                run,
                "{port}",
                batch,
                decode,
            ],
            path="/health",
        )

    servers = {
        "cxr_study": ours,
        "plain async": plainly("async"),
        "plain threads": plainly("threads"),
        "LitServe": lit("1"),
        "LitServe batch": lit("8"),
        "plain threads, our decoding": plainly("threads", "ours"),
        "LitServe, our decoding": lit("1", "ours"),
    }
    servers = {k: v for k, v in servers.items() if not a.only or k in a.only.split(";")}
    found = {
        name: measure(name, how, contents, a.seconds, a.clients) for name, how in servers.items()
    }
    first = next(iter(found.values()))[1]
    apart = {
        name: max(abs(x[i] - first[i]) for i in x if i in first) for name, (_, x) in found.items()
    }
    print(
        "largest difference of logits from the first server:",
        {k: float(f"{v:.2g}") for k, v in apart.items()},
    )
    assert all(v < 1e-3 for k, v in apart.items() if "our" in k)
    result = dict(
        images=len(contents),
        size=[1320, 970],
        clients=a.clients,
        seconds=a.seconds,
        hardware=hardware(),
        versions=versions(("torch", "fastapi", "uvicorn", "litserve", "onnxruntime", "pillow")),
        largest_difference=apart,
        servers={k: f for k, (f, _) in found.items()},
        clients_curve=curve(ours, contents, a.seconds),
        overload=overload(ours, contents, a.seconds),
    )
    if a.out:
        Path(a.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--plain"]:
        plain(sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
    else:
        main()
