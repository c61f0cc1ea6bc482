"""Decode damaged copies of small JPEG, PNG and DICOM files: only typed errors may come, and no decoder may warn about a
file that is answered.

usage: damaged_files.py [COUNT [SEED]]     20,000 copies unless said otherwise
"""

import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / 'tests'))

from pydicom import uid
from test_images import encapsulated, in_syntax, jpeg, mutations, png, stored, to_dicom

from cxr_study.data.formats import ImageError
from cxr_study.data.images import decode


def seeds():
    "Sound files of every format and compression"
    small, deep = stored(8, False), stored(12, False)
    colour = np.dstack([small] * 3)
    pictures = [jpeg(small), jpeg(colour, progressive=True), png(small), png(deep), png(colour)]
    syntaxes = (
        uid.ExplicitVRLittleEndian,
        uid.JPEG2000Lossless,
        uid.RLELossless,
        uid.JPEGLSLossless,
        uid.JPEGLosslessSV1,
    )
    window = dict(WindowCenter=2000, WindowWidth=3000)
    films = [in_syntax(deep, syntax, 12, **window) for syntax in syntaxes]
    return [
        *pictures,
        to_dicom(small),
        encapsulated(small, uid.JPEGBaseline8Bit, jpeg(small)),
        *films,
    ]


def main(count=20_000, seed=0):
    outcome, start = Counter(), time.time()
    with tempfile.TemporaryFile() as messages, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter('always')
        os.dup2(messages.fileno(), 2)  # What the decoders in C write
        for content in mutations(seeds(), count, np.random.default_rng(seed)):
            written, warnings_before = messages.seek(0, os.SEEK_END), len(warned)
            try:
                decode(content)
                kind = 'answered'
            except ImageError:
                kind = 'rejected'
            except Exception as error:
                kind = f"failed with {type(error).__name__}"
            said = messages.seek(0, os.SEEK_END) > written or len(warned) > warnings_before
            outcome[kind] += 1
            if said and kind == 'answered':
                outcome['answered with a warning'] += 1
                outcome[
                    str(warned[-1].message)[:90] if len(warned) > warnings_before else 'stderr'
                ] += 1
    print(f"{count:,} files in {time.time() - start:.0f} s", dict(outcome))


if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
