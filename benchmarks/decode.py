"""Decoding and resizing to 224 px: Pillow's usual way (RGB, then resize) beside the study's road, on the same files
in one run.

usage: decode.py FOLDER [SIZE]     FOLDER: images at their native size, any depth
"""

import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from cxr_study.data.images import Preprocess, decode, resize


def rate(f, files, rounds=3):
    "Images per second, best of several rounds"
    best = 0
    for _ in range(rounds):
        start = time.perf_counter()
        for file in files:
            f(file)
        best = max(best, len(files) / (time.perf_counter() - start))
    return best


def main(folder, size=224):
    files, spec = (
        sorted(f for f in Path(folder).rglob('*') if f.suffix.lower() in ('.jpeg', '.jpg')),
        Preprocess(size),
    )
    sides = np.array([Image.open(f).size for f in files])

    def usual(f):
        return np.asarray(Image.open(f).convert('RGB').resize((size, size)))

    plain, ours = rate(usual, files), rate(spec, files)
    print(f"{len(files)} JPEGs of {sides.min()} to {sides.max()} pixels, one thread")
    print(f"PIL.Image.open(f).convert('RGB').resize(...)   {plain:7.1f} images/s")
    print(
        f"Preprocess({size})                              {ours:7.1f} images/s    {ours / plain:.2f} times as many"
    )
    for name, other in {
        "whole decoding, same filter": lambda f: resize(decode(f), size),
        "PIL's usual way, red channel": lambda f: usual(f)[..., 0],
    }.items():
        apart = np.stack([np.abs(spec(f).astype(int) - other(f)) for f in files])
        print(
            f"grey levels from {name:30} largest {apart.max():3d}   "
            f"99.9 % {np.quantile(apart, 0.999):4.1f}   mean {apart.mean():.2f}"
        )


if __name__ == '__main__':
    main(sys.argv[1], *map(int, sys.argv[2:]))
