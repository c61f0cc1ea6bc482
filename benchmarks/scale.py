"""The decoded cache at the size of NIH ChestX-ray14: phantoms at 224 px, built, verified and iterated; time should
grow linearly, memory not at all.
Seconds are processor seconds of all threads, which do not depend on what else the machine does; `wall` is the clock.

usage: scale.py [IMAGES ...]     default 2803 5606 11212 (a fortieth, a twentieth and a tenth of 112,120)
"""

import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


def resident():
    "Resident memory of this process now, MB"
    return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize() / 2**20


def one(images, folder):
    "Build, open and iterate a cache of so many phantoms; seconds and the largest resident memory of each step, MB"
    from cxr_study.data.cache import batches, build_cache, open_cache
    from cxr_study.data.images import Preprocess
    from cxr_study.data.sets import phantom

    peak, stop = {}, threading.Event()

    def watch():
        while not stop.wait(0.05):
            peak[step] = max(peak.get(step, 0), resident())

    step = 'list'
    threading.Thread(target=watch, daemon=True).start()
    now, begun, seconds = time.process_time, time.time(), {}
    start = now()
    image_set = phantom(images=images, pixels=224)
    seconds['list'], start, step = now() - start, now(), 'build'
    build_cache(image_set, Preprocess(224), Path(folder) / 'cache')
    seconds['build'], start, step = now() - start, now(), 'open'
    pixels, _, _ = open_cache(Path(folder) / 'cache')
    seconds['open'], start, step = now() - start, now(), 'iterate'
    total = sum(int(x.sum()) for _, x in batches(pixels))
    seconds['iterate'] = now() - start
    stop.set()
    print(
        json.dumps(
            dict(
                images=images,
                gigabytes=round(pixels.nbytes / 1e9, 2),
                cpu_seconds={k: round(v, 1) for k, v in seconds.items()},
                wall=round(time.time() - begun, 1),
                peak_mb={k: round(v) for k, v in peak.items()},
                checksum=total,
            )
        )
    )


def main(sizes):
    for images in sizes:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, __file__, '--one', str(images), folder],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            print(done.stdout.strip(), flush=True)


if __name__ == '__main__':
    if sys.argv[1:2] == ['--one']:
        one(int(sys.argv[2]), sys.argv[3])
    else:
        main([int(a) for a in sys.argv[1:]] or [2803, 5606, 11212])
