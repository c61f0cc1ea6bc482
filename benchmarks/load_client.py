"""Starts a service, asks it, and loads it from many clients at once: for the tests, the benchmarks and
`nbs/howto/serving.ipynb`."""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np

from cxr_study.core.run import StudyError


@dataclasses.dataclass
class Running:
    "A service that runs as a process of its own"

    url: str
    process: subprocess.Popen
    log: Path  # What it wrote: a line of JSON a request
    ready_seconds: float  # From the start of the process until it said that it is ready


# What the service's process runs: its arguments come as JSON
CODE = """
import json, sys
from cxr_study.serve.guard import Settings
from cxr_study.serve.service import serve
asked = json.loads(sys.argv[1])
serve(asked.pop('bundle'), Settings(**asked.pop('settings')), **asked)
"""


def free_port():
    "A port of this machine on which nobody listens"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def answers(url, seconds=1.0):
    "Whether a GET of `url` is answered with 200"
    try:
        with urllib.request.urlopen(url, timeout=seconds) as r:
            return r.status == 200
    except OSError:
        return False


def wait_ready(running, path, seconds):
    "Wait until the service answers; `StudyError` with the end of its log if it does not"
    start = time.perf_counter()
    while not answers(running.url + path):
        if running.process.poll() is not None or time.perf_counter() - start > seconds:
            raise StudyError(
                f"The service did not become ready: {running.log.read_text()[-400:] or 'it wrote nothing'}"
            )
        time.sleep(0.01)
    running.ready_seconds = time.perf_counter() - start
    return running


def stop(running, seconds=40.0):
    "End the service with SIGTERM; kill it if it has not ended in time, and whatever it has started and left behind"
    if running.process.poll() is None:
        running.process.send_signal(signal.SIGTERM)
    try:
        running.process.wait(seconds)
    except subprocess.TimeoutExpired:
        running.process.kill()
        running.process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.process.pid, signal.SIGKILL)


@contextlib.contextmanager
def running(
    bundle=None,  # Folder of a bundle; None: the one at hand
    command=None,
    path='/readyz',  # Another server than ours, with {port} in its command; what says that it is ready
    seconds=60.0,
    open_to_all=False,
    **settings,
):  # To become ready; of `guard.Settings`
    "A service on a free port of this machine, as a process of its own; it is ended when the block ends"
    port = free_port()
    said = dict(
        bundle=bundle and str(bundle), settings=dict(settings, port=port), open_to_all=open_to_all
    )
    command = (
        [c.format(port=port) for c in command]
        if command
        else [sys.executable, '-c', CODE, json.dumps(said)]
    )
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / 'log'
        with open(log, 'w') as sink:
            process = subprocess.Popen(command, stdout=sink, stderr=sink, start_new_session=True)
        started = Running(f"http://127.0.0.1:{port}", process, log, 0.0)
        try:
            yield wait_ready(started, path, seconds)
        finally:
            stop(started)


def post(
    url, content, kind='image/jpeg', **headers
):  # Address; bytes; their media type; further headers
    "(status, answer as bytes) of a POST"
    request = urllib.request.Request(
        url, content, {'content-type': kind, **{k.replace('_', '-'): v for k, v in headers.items()}}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as r:
            return r.status, r.read()
    except urllib.error.HTTPError as e:
        return e.code, e.read()


def request_bytes(body, kind='image/jpeg', path='/predict', headers=()):
    "A whole HTTP request as bytes"
    lines = [
        f'POST {path} HTTP/1.1',
        'host: localhost',
        f'content-type: {kind}',
        f'content-length: {len(body)}',
        *headers,
    ]
    return '\r\n'.join(lines).encode() + b'\r\n\r\n' + body


def form_bytes(content, name='file', path='/predict'):
    "The same with the content in a form field"
    head = (
        f'--x\r\ncontent-disposition: form-data; name="{name}"; filename="a"\r\n'
        'content-type: application/octet-stream\r\n\r\n'
    ).encode()
    return request_bytes(head + content + b'\r\n--x--\r\n', 'multipart/form-data; boundary=x', path)


async def exchange(reader, writer, request):
    "Send a request over an open connection; (status, headers as bytes, body)"
    writer.write(request)
    head = (await reader.readuntil(b'\r\n\r\n')).lower()
    length = int(head.split(b'content-length:')[1].split(b'\r\n')[0])
    return int(head[9:12]), head, await reader.readexactly(length)


async def _wait(head):
    "Wait as long as a refusal says, and up to half as long again, lest all who were refused come back together"
    seconds = float(head.split(b'retry-after:')[1].split(b'\r\n')[0])
    await asyncio.sleep(seconds * random.uniform(1, 1.5))


async def client(
    port, requests, end, rows, keep=False
):  # Requests to send in turn; when to stop; where rows go
    """One client: asks until `end`, and writes (start, seconds, status[, body]) for each request; status 0 is a
    lost answer"""
    reader = writer = None
    for request in itertools.cycle(requests):
        start = time.perf_counter()
        if start >= end:
            break
        try:
            if writer is None:
                reader, writer = await asyncio.open_connection('127.0.0.1', port)
            status, head, body = await exchange(reader, writer, request)
        except ConnectionRefusedError:
            break
        except (OSError, asyncio.IncompleteReadError):
            status, head, body = 0, b'', b''
        rows.append((start, time.perf_counter() - start, status) + (body,) * keep)
        if writer and (status == 0 or b'connection: close' in head):
            writer.close()
            writer = None
        if status == 429:
            await _wait(head)
    if writer:
        writer.close()


async def load(
    url,
    requests,  # Of a service; requests as bytes, sent in turn by every client
    clients=40,
    seconds=10.0,  # At once; for how long
    keep=False,
    ramp=0.0,
):  # Keep the bodies of the answers; seconds over which the clients come
    "Rows (start, seconds, status) of every request of so many clients"
    rows, end = [], time.perf_counter() + seconds
    port = int(url.rsplit(':', 1)[1])

    async def one(i):
        await asyncio.sleep(ramp * i / clients)
        await client(
            port, requests[i % len(requests) :] + requests[: i % len(requests)], end, rows, keep
        )

    await asyncio.gather(*map(one, range(clients)))
    return rows


def _percentiles(x):
    return {f'p{q}': round(float(np.percentile(x, q)), 1) for q in (50, 95, 99)} if len(x) else {}


def summary(rows):  # From `load`
    "Requests a second, percentiles of the time of answers and refusals in milliseconds, and how many of each status"
    start, took, status = np.array([r[:3] for r in rows]).T
    done, refused = (1000 * took[status == s] for s in (200, 429))
    seconds = (start + took).max() - start.min()
    counts = {int(s): int(n) for s, n in zip(*np.unique(status, return_counts=True))}
    return dict(
        per_second=round(float(len(done) / seconds), 1),
        answered=_percentiles(done),
        refused=_percentiles(refused),
        statuses=counts,
    )
