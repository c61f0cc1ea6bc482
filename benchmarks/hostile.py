"""What the service does with inputs and clients that want to stop it: the figures of `results/benchmarks/hostile.json`.

usage: hostile.py BUNDLE [--files FOLDER] [--only files;poison;...] [--seconds 60] [--first] [--out FILE.json]

Each part starts a service of its own with BUNDLE:
  files     every hostile request alone, and every file of FOLDER: status, time, memory of all processes of the
            service, time of /livez meanwhile, time of a film that is sent 0.2 s later and of the next film
  poison    twice as many poison files as decoders, ten times in a row, and SIGTERM meanwhile
  sockets   1,000 idle, slow or half-sent connections to a service that may open 256 descriptors
  uploads   64 uploads of the largest size at once
  open      requests that come at ten times the rate that is answered
  mixed     good and hostile requests at once: memory and descriptors at the beginning and the end
  headers   structured reports of 2,000 odd DICOM headers
  mutated   20,000 damaged files and requests: JPEG, PNG, DICOM, JSON
The client shares the cores with the service, so the times of a busy machine are upper limits. With --first (Linux, as
root) service and client get the processor before other sessions of the machine.
"""

import argparse
import asyncio
import contextlib
import functools
import http.client
import io
import json
import multiprocessing
import os
import resource
import selectors
import signal
import socket
import struct
import time
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import load_client
import numpy as np
import pydicom
from load_client import form_bytes, load, post, request_bytes, summary
from PIL import Image
from pydicom.encaps import encapsulate

from cxr_study.core.run import hardware
from cxr_study.data.dicom import to_dicom

RAMP = np.linspace(0, 255, 320).astype(np.uint8) * np.ones((240, 1), np.uint8)
J2K = '1.2.840.10008.1.2.4.90'
RLE = '1.2.840.10008.1.2.5'
JPEG_LS = '1.2.840.10008.1.2.4.80'
BIG = 6324  # Side of the largest square image, pixels
FORK = multiprocessing.get_context('fork')
FIRST = '-15'  # Niceness of a session that comes before others


# --- Hostile files ---


def encode(image, format='JPEG', **options):
    "The bytes of an image file"
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def with_frame(frame, syntax=J2K, side=64, **elements):
    "A DICOM file with this compressed frame"
    dataset = pydicom.dcmread(io.BytesIO(to_dicom(np.zeros((64, 64), np.uint8), J2K)))
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.Rows = side
    dataset.Columns = side
    dataset.PixelData = encapsulate([frame])
    for name, value in elements.items():
        setattr(dataset, name, value)
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


def j2k_frame(side=64, components=1):
    "A JPEG 2000 stream that declares so many pixels and components, with the data of 64 x 64"
    dataset = pydicom.dcmread(io.BytesIO(to_dicom(np.zeros((64, 64), np.uint8), J2K)))
    frame = next(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1))
    start = frame.index(b'\xff\x51') + 2
    length = int.from_bytes(frame[start : start + 2])
    size = struct.pack('>8IH', side, side, 0, 0, side, side, 0, 0, components)
    one = frame[start + 38 : start + 41]
    header = struct.pack('>HH', 38 + 3 * components, 0) + size + one * components
    return frame[:start] + header + frame[start + length :]


def progressive(side, scans):
    "A progressive JPEG of one grey level whose last scan comes so many times"
    content = encode(Image.new('L', (side, side)), progressive=True)
    last = content.rindex(b'\xff\xda')
    scan = content[last:-2]
    return content[:last] + scan * scans + content[-2:]


def chunk(kind, data):
    "A chunk of a PNG"
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


@functools.cache
def noisy(height, width, bits=8):
    "A drawn film with noise, which takes as long to decode as a real one"
    y, x = np.mgrid[:height, :width]
    waves = 0.5 + 0.25 * np.sin(4 * x / width) * np.cos(5 * y / height)
    noise = np.random.default_rng(0).normal(0, 0.01, (height, width))
    values = (2**bits - 1) * (waves + noise).clip(0, 1)
    return values.astype(np.uint8 if bits == 8 else np.uint16)


@functools.cache
def slow_film():
    "A JPEG 2000 film of 20 megapixels and 12 bits: the slowest kind that is answered"
    return to_dicom(noisy(4472, 4472, 12), J2K, BitsStored=12)


def png(width, height, depth=8, colour=0, extra=(), interlace=0):
    "A PNG of one grey level, with further chunks before its pixels"
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = 1 + (width * depth * samples + 7) // 8
    head = struct.pack('>2I5B', width, height, depth, colour, 0, 0, interlace)
    packer = zlib.compressobj(9)
    data = b''.join([packer.compress(bytes(row)) for _ in range(height)]) + packer.flush()
    parts = [chunk(b'IHDR', head), *extra, chunk(b'IDAT', data), chunk(b'IEND', b'')]
    return b'\x89PNG\r\n\x1a\n' + b''.join(parts)


def nested_sequences(depth):
    "A DICOM file whose sequences lie so deep in each other"
    head = to_dicom(RAMP, PixelData=None)
    item = b'\xfe\xff\x00\xe0\xff\xff\xff\xff'
    sequence = b'\x40\x00\x30\xa7SQ\x00\x00\xff\xff\xff\xff' + item
    return head + sequence * depth


def with_values(name, count):
    "A DICOM file whose unsigned short `name` has so many values"
    dataset = pydicom.dcmread(io.BytesIO(to_dicom(np.zeros((64, 64), np.uint8))))
    setattr(dataset, name, [64] * count)
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


def slow_files():
    "Name -> content of sound files that take longest to decode"
    return {
        'j2k 20 megapixels 12 bits': slow_film(),
        'j2k 40 megapixels': to_dicom(noisy(BIG, BIG), J2K),
    }


def hostile_files():
    "Name -> content of files that take much more than they look like"
    exif = b'\xff\xe1' + struct.pack('>H', 2 + 6 + 60_000) + b'Exif\0\0' + b'MM\0*\0\0\0\x08' * 7500
    jpeg = encode(RAMP)
    text = chunk(b'tEXt', b'a\0b')
    bomb = zlib.compress(bytes(50_000_000), 9)
    apng = encode(
        RAMP, 'PNG', save_all=True, append_images=[Image.fromarray(RAMP - i) for i in range(1, 99)]
    )
    lut = pydicom.Dataset()
    lut.LUTDescriptor = [0, 0, 16]
    lut.LUTData = bytes(131_072)
    many_luts = pydicom.Sequence([lut] * 100)
    return {
        'jp2 box of length 0': with_frame(
            b'\0\0\0\x0cjP  \r\n\x87\n\0\0\0\0free' + j2k_frame()
        ),
        'j2k 16 components': with_frame(j2k_frame(BIG, 16), side=BIG),
        'j2k 40 megapixels declared': with_frame(j2k_frame(BIG), side=BIG),
        'j2k truncated': with_frame(j2k_frame()[:90]),
        'jpeg 1000 scans': progressive(6000, 1000),
        'jpeg 10000 scans': progressive(2000, 10_000),
        'jpeg 100 scans': progressive(6000, 100),
        'jpeg 65500 wide': encode(Image.new('L', (65_500, 600))),
        'jpeg 5000 segments': jpeg[:2] + b'\xff\xfe\x00\x04ab' * 5000 + jpeg[2:],
        'jpeg odd exif': jpeg[:2] + exif + jpeg[2:],
        'jpeg only a header': jpeg[:300],
        'jpeg 40 megapixels': encode(Image.new('L', (BIG, BIG))),
        'jpeg 40 megapixels colour': encode(Image.new('RGB', (BIG, BIG), 'red'), progressive=True),
        'png bomb': png(10_000, 10_000),
        'png 40 megapixels rgba': png(BIG, BIG, colour=6),
        'png 40 megapixels 16 bits': png(BIG, BIG, depth=16),
        'png 40 megapixels interlaced': png(BIG, BIG, interlace=1),
        'png 40 million by 1': png(40_000_000, 1),
        'png 1 by 40 million': png(1, 1_000_000),
        'png palette missing': png(64, 64, colour=3),
        'png 50000 texts': png(64, 64, extra=[text] * 50_000),
        'png text bomb': png(64, 64, extra=[chunk(b'zTXt', b'a\0\0' + bomb)]),
        'png profile bomb': png(64, 64, extra=[chunk(b'iCCP', b'a\0\0' + bomb)]),
        'png animated': apng,
        'dicom rows 30000 values': with_values('Rows', 30_000),
        'dicom bits 2 values': with_values('BitsAllocated', 2),
        'dicom 5000 sequences deep': nested_sequences(5000),
        'dicom 100000 sequences deep': nested_sequences(100_000),
        'dicom rle bomb': with_frame(
            struct.pack('<16I', 1, 64, *[0] * 14) + b'\x81\0' * 300_000, RLE, BIG
        ),
        'dicom jpeg-ls': with_frame(
            b'\xff\xd8\xff\xf7\0\x0b\x08\xff\xff\xff\xff\1\1\x11\0', JPEG_LS, 65535
        ),
        'dicom 100 look-up tables': to_dicom(RAMP, VOILUTSequence=many_luts),
        'dicom window of 50000 values': to_dicom(
            RAMP, WindowCenter=['128'] * 5000, WindowWidth=['256'] * 5000
        ),
        'dicom 1000 frames': to_dicom(RAMP, NumberOfFrames=1000),
        'dicom private 20 MB': to_dicom(RAMP, PatientComments='a' * 60_000) + bytes(20_000_000),
    }  # fmt: skip


def hostile_requests(name, size):  # Of the model; side of its image
    "Name -> (path, media type, content, further headers) of hostile requests without an image file"
    tensor = dict(name='image', datatype='UINT8', shape=[1, 1, size, size])
    path = f'/v2/models/{name}/infer'
    kind = 'application/json'

    def infer(data, **more):
        return json.dumps(dict(inputs=[dict(tensor, data=data)], **more)).encode()

    pixels = [0] * size * size
    form = b''.join(
        b'--x\r\ncontent-disposition: form-data; name="f%d"\r\n\r\n1\r\n' % i for i in range(50_000)
    )
    long_head = b'--x\r\ncontent-disposition: form-data; name="file"; x="' + b'a' * 10**6
    return {
        'infer strings': (path, kind, infer(['a' * 500_000] + ['b'] * 999), {}),
        'infer nested lists': (path, kind, b'{"inputs": [' + b'[' * 200_000, {}),
        'infer million numbers': (path, kind, infer([1] * 10**6), {}),
        'infer huge numbers': (path, kind, infer([10**400] * 1000), {}),
        'infer 40 MB of JSON': (path, kind, b'[' + b'1,' * 20_000_000 + b'1]', {}),
        'infer outputs 100000 times': (
            path, kind, infer(pixels, outputs=[dict(name='logit')] * 100_000), {},
        ),
        'infer outputs twice': (path, kind, infer(pixels, outputs=[dict(name='logit')] * 2), {}),
        'infer odd length': (path, kind, infer(pixels), {'Inference-Header-Content-Length': '٣'}),
        'infer length -1': (path, kind, infer(pixels), {'Inference-Header-Content-Length': '-1'}),
        'form 50000 fields': ('/predict', 'multipart/form-data; boundary=x', form, {}),
        'form long header': ('/predict', 'multipart/form-data; boundary=x', long_head, {}),
        'compressed': ('/predict', 'image/png', b'x' * 1000, {'Content-Encoding': 'gzip'}),
        'empty': ('/predict', 'image/png', b'', {}),
    }  # fmt: skip


# --- Watching a service ---


def processes(pid):
    "A process and all below it"
    found = [pid]
    for task in Path(f'/proc/{pid}/task').glob('*/children'):
        for child in task.read_text().split():
            found += processes(int(child))
    return found


def memory(pid):
    "Memory of a process and all below it, MB (shared pages are counted once)"
    total = 0
    for process in processes(pid):
        try:
            text = Path(f'/proc/{process}/smaps_rollup').read_text()
        except OSError:
            continue
        total += int(text.split('Pss:')[1].split()[0]) / 1024
    return round(total)


def descriptors(pid):
    return len(os.listdir(f'/proc/{pid}/fd'))


@contextlib.contextmanager
def running(bundle, first=False):
    "A service; with `first`, it gets the processor before other sessions of the machine"
    with load_client.running(bundle, seconds=180, drain_seconds=0.2) as service:
        if first:
            for pid in processes(service.process.pid):
                Path(f'/proc/{pid}/autogroup').write_text(FIRST)
        yield service


def port_of(service):
    return int(service.url.rsplit(':', 1)[1])


def watch(port, pid, pipe):
    "Until told to stop, ask /livez and read the memory; then send the times, ms, and the memory, MB"
    client = http.client.HTTPConnection('127.0.0.1', port)
    times = []
    used = [memory(pid)]
    while not pipe.poll(0.02):
        start = time.perf_counter()
        client.request('GET', '/livez')
        answer = client.getresponse()
        answer.read()
        times.append(1000 * (time.perf_counter() - start))
        assert answer.status == 200
        if len(times) % 3 == 0:
            used.append(memory(pid))
    pipe.send((times, used))


class Watch:
    "Watches a service while the block runs, from a process of its own"

    def __init__(self, service):
        self.pipe, there = FORK.Pipe()
        arguments = (port_of(service), service.process.pid, there)
        self.process = FORK.Process(target=watch, args=arguments, daemon=True)

    def __enter__(self):
        self.process.start()
        return self

    def __exit__(self, *error):
        self.pipe.send('stop')
        self.times, self.memory = self.pipe.recv()
        self.process.join()

    def found(self):
        p50, p99 = np.percentile(self.times, (50, 99))
        return dict(
            livez_p50_ms=round(float(p50), 1),
            livez_p99_ms=round(float(p99), 1),
            memory_at_rest_mb=self.memory[0],
            memory_peak_mb=max(self.memory),
        )


async def sent(service, path, kind, content, headers):
    "(status, seconds, answer) of a request in a thread"
    start = time.perf_counter()
    try:
        status, answer = await asyncio.to_thread(
            post, service.url + path, content, kind, **{k: v.encode() for k, v in headers.items()}
        )
    except OSError:  # Closed before the answer was read
        status, answer = 0, b''
    return status, round(time.perf_counter() - start, 2), answer


async def ask(service, path, kind, content, headers):
    "(status, seconds) of a request in a thread"
    return (await sent(service, path, kind, content, headers))[:2]


async def ask_film(service, wait=0.0):
    "(status, seconds) of a film"
    await asyncio.sleep(wait)
    return await ask(service, '/predict', 'image/jpeg', encode(RAMP), {})


def reason(answer):
    "What the service says of a request that it refuses"
    with contextlib.suppress(ValueError):
        return json.loads(answer).get('detail')


# --- The parts ---


async def one_case(service, name, request):
    "What one hostile request does to a service"
    with Watch(service) as watching:
        await asyncio.sleep(0.2)
        answered, meanwhile = await asyncio.gather(
            sent(service, *request), ask_film(service, wait=0.2)
        )
        status, seconds, answer = answered
        following = await ask_film(service)
    found = dict(status=status, seconds=seconds, meanwhile=meanwhile, next=following)
    found |= watching.found() | dict(reason=reason(answer))
    print(f'{name:32}', found, flush=True)
    return found


def files(bundle, arguments):
    "Every hostile request alone"
    facts = json.loads((Path(bundle) / 'bundle.json').read_text())
    requests = {
        name: ('/predict', 'application/dicom', content, {})
        for name, content in (hostile_files() | slow_files()).items()
    }
    requests |= hostile_requests(facts['name'], facts['preprocess']['size'])
    for file in sorted(Path(arguments.files).glob('*.[djp]*')) if arguments.files else ():
        requests[file.name] = ('/predict', 'application/dicom', file.read_bytes(), {})
    report = to_dicom(RAMP, StudyInstanceUID='1.2', SeriesInstanceUID='1.3', StudyDate='odd')
    requests['odd report'] = (
        '/predict',
        'application/dicom',
        report,
        dict(Accept='application/dicom'),
    )
    with running(bundle, arguments.first) as service:
        return {
            name: asyncio.run(one_case(service, name, request))
            for name, request in requests.items()
        }


def attack(service, content):
    "Twice as many requests as decoders, all at once"
    request = ('/predict', 'application/dicom', content, {})
    return [asyncio.create_task(ask(service, *request)) for _ in range(4)]


async def poison_rounds(service, content):
    "(answers to poison, answer to the next film) ten times; then (exit code, seconds) of SIGTERM meanwhile"
    rounds = []
    for _ in range(10):
        answers = await asyncio.gather(*attack(service, content))
        rounds.append(dict(answers=answers, next=await ask_film(service)))
        print(rounds[-1], flush=True)
    tasks = attack(service, content)
    await asyncio.sleep(0.5)
    start = time.perf_counter()
    service.process.send_signal(signal.SIGTERM)
    code = await asyncio.to_thread(service.process.wait, 60)
    seconds = round(time.perf_counter() - start, 2)
    await asyncio.gather(*tasks)
    return dict(rounds=rounds, exit_code=code, stop_seconds=seconds)


def poison(bundle, arguments):
    "Twice as many poison files as decoders, ten times in a row, and SIGTERM meanwhile"
    with running(bundle, arguments.first) as service:
        found = asyncio.run(poison_rounds(service, slow_film()))
    print(found, flush=True)
    return found


async def slow_socket(port, kind):
    "A connection that never completes a request"
    try:
        reader, writer = await asyncio.open_connection('127.0.0.1', port)
        if kind == 'header':
            writer.write(b'GET / HTTP/1.1\r\nhost: localhost\r\n')
        if kind == 'body':
            writer.write(
                b'POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: image/png\r\n'
                b'content-length: 100000\r\n\r\n'
            )
        while kind != 'idle':
            await asyncio.sleep(1)
            writer.write(b'x')
            await writer.drain()
        await reader.read()
    except (OSError, asyncio.IncompleteReadError):
        pass


def sockets(bundle, arguments):
    "1,000 slow or idle connections, and an honest client"
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    with running(bundle, arguments.first) as service:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, before[1]), before[1]))
        port = port_of(service)

        async def attack():
            kinds = ('idle', 'header', 'body')
            tasks = [asyncio.create_task(slow_socket(port, kinds[i % 3])) for i in range(1000)]
            answers = []
            for _ in range(20):
                await asyncio.sleep(0.5)
                answers.append(await ask_film(service))
            opened = descriptors(service.process.pid)
            for task in tasks:
                task.cancel()
            return answers, opened

        answers, opened = asyncio.run(attack())
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
    found = dict(answers=answers, descriptors=opened)
    print(found, flush=True)
    return found


def uploads(bundle, arguments):
    "64 uploads of 43 MB at once"
    with running(bundle, arguments.first) as service:
        content = bytes(43_000_000)

        async def attack():
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(80))
            with Watch(service) as watching:
                answers = await asyncio.gather(
                    *(ask(service, '/predict', 'image/png', content, {}) for _ in range(64))
                )
            return answers, watching.found()

        answers, found = asyncio.run(attack())
    statuses = [status for status, _ in answers]
    found['statuses'] = {str(s): statuses.count(s) for s in sorted(set(statuses))}
    print(found, flush=True)
    return found


def proceed(selector, key, events, rows):
    "Send the rest of a request, or read more of its answer"
    request = key.data
    try:
        if events & selectors.EVENT_WRITE:
            request['rest'] = request['rest'][key.fileobj.send(request['rest']) :]
            if not request['rest']:
                selector.modify(key.fileobj, selectors.EVENT_READ, request)
            return
        received = key.fileobj.recv(65_536)
    except OSError:
        received = b''
    request['answer'] += received
    if not received:
        rows.append((request['due'], time.perf_counter() - request['due'], request['answer'][9:12]))
        selector.unregister(key.fileobj)
        key.fileobj.close()


def arrivals(port, content, rate, seconds):
    "Rows (due, seconds after that, status) of requests at this rate, each over a connection of its own"
    selector = selectors.DefaultSelector()
    rows = []
    begun = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds + 60:
        while begun < rate * min(elapsed, seconds):
            connection = socket.socket()
            connection.setblocking(False)
            connection.connect_ex(('127.0.0.1', port))
            request = dict(due=start + begun / rate, rest=memoryview(content), answer=b'')
            selector.register(connection, selectors.EVENT_WRITE, request)
            begun += 1
        if elapsed > seconds and not selector.get_map():
            break
        for key, events in selector.select(0.002):
            proceed(selector, key, events, rows)
    rows += [(start, 0.0, b'')] * (begun - len(rows))  # Not answered at all
    return [(due, took, int(status or 0)) for due, took, status in rows]


def open_loop(bundle, arguments):
    "Requests that come at ten times the rate that is answered"
    film = encode(noisy(970, 1320), quality=90)
    closing = form_bytes(film).replace(b'\r\n', b'\r\nconnection: close\r\n', 1)
    with running(bundle, arguments.first) as service:
        capacity = summary(asyncio.run(load(service.url, [form_bytes(film)], 8, 5.0)))
        rate = 10 * capacity['per_second']
        with ProcessPoolExecutor(1, FORK) as pool, Watch(service) as watching:
            job = pool.submit(arrivals, port_of(service), closing, rate, arguments.seconds)
            rows = job.result()
    found = watching.found() | summary(rows)
    found |= dict(
        film_bytes=len(film), capacity_per_second=capacity['per_second'], asked_per_second=rate
    )
    print(found, flush=True)
    return found


def mixed(bundle, arguments):
    "Good and hostile requests at once, for five times the seconds"
    bad = [content for content in hostile_files().values() if len(content) < 400_000]
    good = [form_bytes(encode(RAMP)), request_bytes(to_dicom(RAMP))]
    requests = good * 20 + [request_bytes(content) for content in bad]
    with running(bundle, arguments.first) as service:
        pid = service.process.pid
        asyncio.run(load(service.url, requests, clients=6, seconds=20.0))
        before = dict(memory_mb=memory(pid), descriptors=descriptors(pid))
        rows = asyncio.run(load(service.url, requests, clients=6, seconds=5 * arguments.seconds))
        time.sleep(2)
        after = dict(memory_mb=memory(pid), descriptors=descriptors(pid))
    found = dict(before=before, after=after, **summary(rows))
    print(found, flush=True)
    return found


def odd_value(rng):
    "A value that DICOM does not expect"
    texts = [
        '',
        ' ',
        'odd',
        '1.2.',
        '20250230',
        '\\',
        'a\\b\\c',
        'Ä^Ö',
        '\x00',
        'x' * 300,
        '-1',
        '1e999',
        'nan',
    ]
    return texts[rng.integers(len(texts))]


KEYWORDS = [
    'PatientID', 'PatientName', 'PatientBirthDate', 'PatientSex', 'AccessionNumber', 'StudyID',
    'StudyDate', 'StudyTime', 'ReferringPhysicianName', 'StudyInstanceUID', 'SeriesInstanceUID',
    'SOPInstanceUID', 'SOPClassUID', 'SpecificCharacterSet', 'PatientAge', 'StudyDescription',
    'IssuerOfPatientID', 'OtherPatientIDs', 'TimezoneOffsetFromUTC', 'PatientBirthTime',
]  # fmt: skip


def set_odd_value(dataset, keyword, rng):
    "Give an element a value that DICOM does not expect, if pydicom can write it"
    tag = pydicom.datadict.tag_for_keyword(keyword)
    kind = 'LO' if rng.random() < 0.3 else pydicom.datadict.dictionary_VR(tag)
    before = dataset.get(tag)
    try:
        dataset[tag] = pydicom.DataElement(tag, kind, odd_value(rng))
        dataset.save_as(io.BytesIO())
    except Exception:
        if before is None:
            dataset.pop(tag, None)
        else:
            dataset[tag] = before


def odd_header(rng):
    "A DICOM radiograph with one to three odd values in its header"
    ids = dict(StudyInstanceUID='1.2', SeriesInstanceUID='1.3')
    dataset = pydicom.dcmread(io.BytesIO(to_dicom(RAMP[:64, :64], **ids)))
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for keyword in rng.choice(KEYWORDS, rng.integers(1, 4), replace=False):
            set_odd_value(dataset, keyword, rng)
        dataset.save_as(buffer)
    return buffer.getvalue()


def headers(bundle, arguments):
    "Structured reports of odd headers"
    rng = np.random.default_rng(0)
    kind = 'application/dicom'
    statuses = []
    with running(bundle, arguments.first) as service:
        for _ in range(arguments.headers):
            content = odd_header(rng)
            statuses.append(post(service.url + '/predict', content, kind, Accept=kind)[0])
    found = {str(s): statuses.count(s) for s in sorted(set(statuses))}
    print(found, flush=True)
    return found


def mutated(bundle, arguments):
    "Damaged files and requests over HTTP"
    from test_serving import mutated as damage

    facts = json.loads((Path(bundle) / 'bundle.json').read_text())
    tensor = hostile_requests(facts['name'], facts['preprocess']['size'])['infer outputs twice']
    small = RAMP[:64, :64]
    files = [
        encode(small), encode(small, 'PNG'), to_dicom(small),
        encode(Image.fromarray(small).convert('RGB'), progressive=True),
        encode(small.astype(np.uint16) * 200, 'PNG'), to_dicom(small, RLE),
        to_dicom(small.astype(np.uint16) * 16, J2K, BitsStored=12), to_dicom(small, JPEG_LS),
    ]  # fmt: skip
    seeds = [('/predict', 'application/dicom', content) for content in files] + [tensor[:3]]

    def one(i):
        path, kind, content = seeds[i % len(seeds)]
        content = damage(content, np.random.default_rng([1, i]))
        return post(service.url + path, content, kind)[0]

    with running(bundle, arguments.first) as service, ThreadPoolExecutor(4) as pool:
        pid = service.process.pid
        list(pool.map(one, range(200)))
        before = dict(memory_mb=memory(pid), descriptors=descriptors(pid))
        statuses = list(pool.map(one, range(arguments.mutated)))
        after = dict(memory_mb=memory(pid), descriptors=descriptors(pid))
    found = dict(before=before, after=after)
    found['statuses'] = {str(s): statuses.count(s) for s in sorted(set(statuses))}
    print(found, flush=True)
    return found


PARTS = dict(
    files=files, poison=poison, sockets=sockets, uploads=uploads, open=open_loop,
    mixed=mixed, headers=headers, mutated=mutated,
)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('bundle')
    parser.add_argument('--files', default='', help="a folder with further files")
    parser.add_argument('--only', default=';'.join(PARTS))
    parser.add_argument('--seconds', type=float, default=60.0)
    parser.add_argument('--headers', type=int, default=2000)
    parser.add_argument('--mutated', type=int, default=20_000)
    parser.add_argument('--first', action='store_true', help="before other work of the machine")
    parser.add_argument('--out')
    arguments = parser.parse_args()
    out = Path(arguments.out) if arguments.out else None
    result = json.loads(out.read_text()) if out and out.exists() else {}
    if arguments.first:
        Path('/proc/self/autogroup').write_text(FIRST)
    for name in arguments.only.split(';'):
        print(f'--- {name}', flush=True)
        result[name] = PARTS[name](arguments.bundle, arguments)
        result.setdefault('measured', {})[name] = dict(
            time=time.strftime('%Y-%m-%d %H:%M', time.gmtime()),
            load_average=os.getloadavg(),  # More than the cores: the machine was busy
            first=arguments.first,
            bundle=Path(arguments.bundle).name,
        )
        result['hardware'] = hardware()
        if out:
            out.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()
