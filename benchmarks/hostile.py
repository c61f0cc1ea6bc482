"""What the service does with inputs and clients that want to stop it: the figures of `results/benchmarks/hostile.json`.

usage: hostile.py BUNDLE [--files FOLDER] [--only files;poison;...] [--seconds 60] [--out FILE.json]

Each part starts a service of its own with BUNDLE:
  files     every hostile request alone, and every file of FOLDER: status, time, memory of all processes of the
            service, time of /livez meanwhile, time of the next film
  poison    twice as many poison files as decoders, ten times in a row, and SIGTERM meanwhile
  sockets   1,000 idle, slow or half-sent connections to a service that may open 256 descriptors
  uploads   64 uploads of the largest size at once
  open      requests that come at ten times the rate that is answered
  mixed     good and hostile requests at once: memory and descriptors at the beginning and the end
  headers   structured reports of 2,000 odd DICOM headers
  mutated   20,000 damaged files
The client shares the cores with the service, so the times of a busy machine are upper limits.
"""

import argparse
import asyncio
import io
import json
import os
import resource
import signal
import struct
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pydicom
from load_client import exchange, form_bytes, load, post, request_bytes, running, summary
from PIL import Image
from pydicom.encaps import encapsulate

from cxr_study.core.run import hardware
from cxr_study.data.dicom import to_dicom

RAMP = np.linspace(0, 255, 320).astype(np.uint8) * np.ones((240, 1), np.uint8)
J2K = '1.2.840.10008.1.2.4.90'
RLE = '1.2.840.10008.1.2.5'
JPEG_LS = '1.2.840.10008.1.2.4.80'
BIG = 6324  # Side of the largest square image, pixels


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


class Watch:
    "Asks /livez and reads the memory of a service while the block runs"

    def __init__(self, service):
        self.service = service
        self.port = int(service.url.rsplit(':', 1)[1])
        self.times = []
        self.memory = [memory(service.process.pid)]

    async def __aenter__(self):
        self.tasks = [asyncio.create_task(self.health()), asyncio.create_task(self.measure())]
        return self

    async def __aexit__(self, *error):
        for task in self.tasks:
            task.cancel()

    async def health(self):
        reader, writer = await asyncio.open_connection('127.0.0.1', self.port)
        while True:
            start = time.perf_counter()
            status, head, _ = await exchange(
                reader, writer, b'GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n'
            )
            assert status == 200
            self.times.append(1000 * (time.perf_counter() - start))
            if b'connection: close' in head:
                writer.close()
                reader, writer = await asyncio.open_connection('127.0.0.1', self.port)
            await asyncio.sleep(0.02)

    async def measure(self):
        while True:
            self.memory.append(await asyncio.to_thread(memory, self.service.process.pid))
            await asyncio.sleep(0.1)

    def found(self):
        p50, p99 = np.percentile(self.times or [np.nan], (50, 99))
        return dict(
            livez_p50_ms=round(float(p50), 1),
            livez_p99_ms=round(float(p99), 1),
            memory_at_rest_mb=self.memory[0],
            memory_peak_mb=max(self.memory),
        )


async def ask(service, path, kind, content, headers):
    "(status, seconds) of a request in a thread"
    start = time.perf_counter()
    try:
        status, _ = await asyncio.to_thread(
            post, service.url + path, content, kind, **{k: v.encode() for k, v in headers.items()}
        )
    except OSError:  # Closed before the answer was read
        status = 0
    return status, round(time.perf_counter() - start, 2)


# --- The parts ---


async def one_case(service, name, request):
    "What one hostile request does to a service"
    async with Watch(service) as watch:
        await asyncio.sleep(0.2)
        status, seconds = await ask(service, *request)
        next_status, next_seconds = await ask(service, '/predict', 'image/jpeg', encode(RAMP), {})
    found = dict(status=status, seconds=seconds, next_status=next_status, next_seconds=next_seconds)
    found |= watch.found()
    print(f'{name:32}', found, flush=True)
    return found


def files(bundle, arguments):
    "Every hostile request alone"
    facts = json.loads((Path(bundle) / 'bundle.json').read_text())
    requests = {
        name: ('/predict', 'application/dicom', content, {})
        for name, content in hostile_files().items()
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
    with running(bundle, drain_seconds=0.2) as service:
        return {
            name: asyncio.run(one_case(service, name, request))
            for name, request in requests.items()
        }


def poison(bundle, arguments):
    "Twice as many poison files as decoders, ten times"
    content = hostile_files()['jpeg 100 scans']
    rounds = []
    for _ in range(10):
        with running(bundle, drain_seconds=0.2) as service:

            async def attack(service=service):
                return await asyncio.gather(
                    *(ask(service, '/predict', 'image/jpeg', content, {}) for _ in range(4))
                )

            answers = asyncio.run(attack())
            status, seconds = asyncio.run(ask(service, '/predict', 'image/jpeg', encode(RAMP), {}))

            async def attack_and_stop(service=service):
                tasks = [
                    asyncio.create_task(ask(service, '/predict', 'image/jpeg', content, {}))
                    for _ in range(4)
                ]
                await asyncio.sleep(0.5)
                start = time.perf_counter()
                service.process.send_signal(signal.SIGTERM)
                code = await asyncio.to_thread(service.process.wait, 60)
                await asyncio.gather(*tasks)
                return code, round(time.perf_counter() - start, 2)

            code, stop_seconds = asyncio.run(attack_and_stop())
        found = dict(
            answers=answers, next_status=status, next_seconds=seconds,
            exit_code=code, stop_seconds=stop_seconds,
        )  # fmt: skip
        print(found, flush=True)
        rounds.append(found)
    return rounds


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
    with running(bundle, drain_seconds=0.2) as service:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, before[1]), before[1]))
        port = int(service.url.rsplit(':', 1)[1])

        async def attack():
            kinds = ('idle', 'header', 'body')
            tasks = [asyncio.create_task(slow_socket(port, kinds[i % 3])) for i in range(1000)]
            answers = []
            for _ in range(20):
                await asyncio.sleep(0.5)
                answers.append(await ask(service, '/predict', 'image/jpeg', encode(RAMP), {}))
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
    with running(bundle, drain_seconds=0.2) as service:
        content = bytes(43_000_000)

        async def attack():
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(80))
            async with Watch(service) as watch:
                answers = await asyncio.gather(
                    *(ask(service, '/predict', 'image/png', content, {}) for _ in range(64))
                )
            return answers, watch.found()

        answers, found = asyncio.run(attack())
    statuses = [status for status, _ in answers]
    found['statuses'] = {str(s): statuses.count(s) for s in sorted(set(statuses))}
    print(found, flush=True)
    return found


async def one_open(port, request, rows):
    "A request over a connection of its own"
    start = time.perf_counter()
    try:
        reader, writer = await asyncio.open_connection('127.0.0.1', port)
        status, _, _ = await exchange(reader, writer, request)
        writer.close()
    except (OSError, asyncio.IncompleteReadError):
        status = 0
    rows.append((start, time.perf_counter() - start, status))


def open_loop(bundle, arguments):
    "Requests that come at ten times the rate that is answered"
    request = form_bytes(encode(RAMP))
    with running(bundle, drain_seconds=0.2) as service:
        port = int(service.url.rsplit(':', 1)[1])
        capacity = summary(asyncio.run(load(service.url, [request], clients=8, seconds=5.0)))
        rate = 10 * capacity['per_second']

        async def attack():
            rows = []
            tasks = []
            start = time.perf_counter()
            async with Watch(service) as watch:
                while (elapsed := time.perf_counter() - start) < arguments.seconds:
                    while len(tasks) < rate * elapsed:
                        tasks.append(asyncio.create_task(one_open(port, request, rows)))
                    await asyncio.sleep(0.005)
                await asyncio.gather(*tasks)
            return rows, watch.found()

        rows, found = asyncio.run(attack())
    found |= dict(capacity_per_second=capacity['per_second'], asked_per_second=rate)
    found |= summary(rows)
    print(found, flush=True)
    return found


def mixed(bundle, arguments):
    "Good and hostile requests at once, for five times the seconds"
    bad = [
        content for name, content in hostile_files().items()
        if len(content) < 400_000 and '40' not in name
    ]  # fmt: skip
    good = [form_bytes(encode(RAMP)), request_bytes(to_dicom(RAMP))]
    requests = good * 20 + [request_bytes(content) for content in bad]
    with running(bundle, drain_seconds=0.2) as service:
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
    with running(bundle, drain_seconds=0.2) as service:
        for _ in range(arguments.headers):
            content = odd_header(rng)
            statuses.append(post(service.url + '/predict', content, kind, Accept=kind)[0])
    found = {str(s): statuses.count(s) for s in sorted(set(statuses))}
    print(found, flush=True)
    return found


def mutated(bundle, arguments):
    "Damaged files over HTTP"
    from test_serving import mutated as damage

    rng = np.random.default_rng(1)
    small = RAMP[:64, :64]
    seeds = [
        encode(small), encode(small, 'PNG'), to_dicom(small),
        encode(Image.fromarray(small).convert('RGB'), progressive=True),
        to_dicom(small.astype(np.uint16) * 16, J2K, BitsStored=12), to_dicom(small, RLE),
    ]  # fmt: skip
    statuses = []
    with running(bundle, drain_seconds=0.2) as service:
        pid = service.process.pid
        before = dict(memory_mb=memory(pid), descriptors=descriptors(pid))
        for i in range(arguments.mutated):
            content = damage(seeds[i % len(seeds)], rng)
            statuses.append(post(service.url + '/predict', content, 'application/dicom')[0])
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
    parser.add_argument('--out')
    arguments = parser.parse_args()
    out = Path(arguments.out) if arguments.out else None
    result = json.loads(out.read_text()) if out and out.exists() else {}
    for name in arguments.only.split(';'):
        print(f'--- {name}', flush=True)
        result[name] = PARTS[name](arguments.bundle, arguments)
        result['load_average'] = os.getloadavg()  # More than the cores: the machine was busy
        result['hardware'] = hardware()
        if out:
            out.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()
