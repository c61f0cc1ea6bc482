"""How many damaged copies of radiographs are answered, by compression and by the kind and size of the hole; and how
many sound files are taken for damaged. JPEG: films at native size. JPEG 2000: the middle 512 x 512 pixels of each.

usage: holed_films.py [--count COUNT] [--out JSON]     12 copies a film, kind and size unless said otherwise
"""

import argparse
import io
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom import uid

sys.path.insert(0, str(Path(__file__).parents[1] / 'tests'))

from test_images import drawings, encapsulated

from cxr_study.data.formats import ImageError, jpeg_segments
from cxr_study.data.images import decode

SIZES = (8, 16, 32, 64, 256, 700)  # Bytes
START_OF_SCAN = 0xDA
START_OF_DATA = b'\xff\x93'
SIDE = 512  # Pixels of a film that are compressed as JPEG 2000
JPEG_2000 = {
    'JPEG 2000, lossless': dict(),
    'JPEG 2000, ten times smaller': dict(irreversible=True, quality_layers=[10]),
}


def fillings(size, rng):
    "What lies in place of so many bytes"
    return {'zeros': bytes(size), 'nothing': b'', 'random bytes': rng.bytes(size)}


def is_answered(content):
    try:
        decode(content, at_least=64)
    except ImageError:
        return False
    return True


def middle(film):
    "The middle of a film, uint8"
    pixels = decode(film)
    top, left = [(side - SIDE) // 2 for side in pixels.shape]
    return pixels[top : top + SIDE, left : left + SIDE]


def jpeg_2000(pixels, options):
    "A JPEG 2000 codestream"
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, 'JPEG2000', no_jp2=True, **options)
    return buffer.getvalue()


def in_dicom(pixels, stream):
    return encapsulated(pixels, uid.JPEG2000, stream)


def jpegs(films):
    "(stream, first byte of its pixels, a function from a stream to a file) of each film"
    for film in films:
        stream = film.read_bytes()
        first = next(end for marker, _, end in jpeg_segments(stream) if marker == START_OF_SCAN)
        yield stream, first, bytes


def jpegs_2000(films, options):
    "As `jpegs`"
    for film in films:
        pixels = middle(film)
        stream = jpeg_2000(pixels, options)
        first = stream.index(START_OF_DATA) + len(START_OF_DATA)
        yield stream, first, lambda damaged, pixels=pixels: in_dicom(pixels, damaged)


def answered(streams, count, rng):
    "Kind -> size -> damaged copies that are answered"
    found = {kind: Counter() for kind in fillings(0, rng)}
    for stream, first, wrap in streams:
        for size in SIZES * count:
            at = int(rng.integers(first, len(stream) - 2 - size))
            for kind, filling in fillings(size, rng).items():
                damaged = stream[:at] + filling + stream[at + size :]
                found[kind][size] += is_answered(wrap(damaged))
    return found


def refused_jpegs(data):
    "(sound files, those that are refused)"
    folders = ('native', 'chest_xray', 'chest_xray_aspect')
    sound = [file for name in folders for file in sorted((data / name).rglob('*.jpeg'))]
    return len(sound), sum(not is_answered(file.read_bytes()) for file in sound)


def refused_jpegs_2000(films, options):
    "(sound files of films and drawings, those that are refused)"
    pictures = [*map(middle, films), *(drawing.astype(np.uint8) for drawing in drawings())]
    files = [in_dicom(pixels, jpeg_2000(pixels, options)) for pixels in pictures]
    return len(files), sum(not is_answered(file) for file in files)


def measured(name, films, data, count):
    "What is found for one kind of compression"
    if name == 'JPEG':
        streams, sound = jpegs(films), refused_jpegs(data)
    else:
        streams = jpegs_2000(films, JPEG_2000[name])
        sound = refused_jpegs_2000(films, JPEG_2000[name])
    found = answered(streams, count, np.random.default_rng(1))
    return dict(
        sound=dict(files=sound[0], refused=sound[1]),
        damaged_of_each=count * len(films),
        answered=found,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--count', type=int, default=12)
    parser.add_argument('--out')
    arguments = parser.parse_args()
    data = Path(os.environ.get('CXR_DATA', 'data'))
    films = sorted((data / 'native' / 'test').rglob('*.jpeg'))
    result = dict(measured=time.strftime('%Y-%m-%d', time.gmtime()))
    for name in ('JPEG', *JPEG_2000):
        result[name] = measured(name, films, data, arguments.count)
        print(name, json.dumps(result[name]), flush=True)
        if arguments.out:
            Path(arguments.out).write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()
