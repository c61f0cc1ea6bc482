"""How many damaged copies of radiographs at native size are answered, by the kind and size of the hole; and how many
sound files are taken for damaged.

usage: holed_films.py [COUNT [SEED]]     12 copies a film, kind and size unless said otherwise
"""

import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from cxr_study.data.formats import ImageError, jpeg_segments
from cxr_study.data.images import decode

SIZES = (8, 16, 32, 64, 256, 700)  # Bytes
START_OF_SCAN = 0xDA


def fillings(size, rng):
    "What lies in place of so many bytes"
    return {'zeros': bytes(size), 'nothing': b'', 'random bytes': rng.bytes(size)}


def is_answered(content):
    try:
        decode(content, at_least=64)
    except ImageError:
        return False
    return True


def answered(films, count, rng):
    "(kind, size) -> damaged copies that are answered"
    found = Counter()
    for film in films:
        whole = film.read_bytes()
        first = next(end for marker, _, end in jpeg_segments(whole) if marker == START_OF_SCAN)
        for size in SIZES * count:
            at = int(rng.integers(first, len(whole) - 2 - size))
            for kind, filling in fillings(size, rng).items():
                found[kind, size] += is_answered(whole[:at] + filling + whole[at + size :])
    return found


def main(count=12, seed=1):
    data = Path(os.environ.get('CXR_DATA', 'data'))
    folders = ('native', 'chest_xray', 'chest_xray_aspect')
    sound = [file for name in folders for file in sorted((data / name).rglob('*.jpeg'))]
    refused = sum(not is_answered(file.read_bytes()) for file in sound)
    print(f"{len(sound):,} sound files, {refused} refused", flush=True)
    films = sorted((data / 'native' / 'test').rglob('*.jpeg'))
    found = answered(films, count, np.random.default_rng(seed))
    for kind, size in found:
        share = found[kind, size]
        print(f"hole of {size} bytes, {kind}: {share} of {count * len(films)} answered")


if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
