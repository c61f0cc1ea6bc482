"""The decoded cache at the size of NIH ChestX-ray14: phantoms at 224 px, built, verified and iterated; time should
grow linearly, memory not at all.
Seconds are processor seconds of all threads, `wall` is the clock. Each figure is the median of five rounds, in each of
which every size is built in turn; `builds` holds the seconds of each build.

usage: scale.py [OUT.json] [IMAGES ...]     default 701 2803 11212: 1, 4 and 16 times as many, the last a tenth of NIH's
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from cxr_study.core.run import hardware

ROUNDS = 5


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


def measured(images):
    "What `one` prints in a process of its own"
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, __file__, '--one', str(images), folder],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    print(done.stdout.strip(), flush=True)
    return json.loads(done.stdout)


def medians(rounds):  # Of one size
    "The median of each number, however deep it lies; steps that no sample fell into are left out"
    first = rounds[0]
    if isinstance(first, dict):
        names = [name for name in first if all(name in each for each in rounds)]
        return {name: medians([each[name] for each in rounds]) for name in names}
    return statistics.median(rounds)


def main(sizes):
    rounds = [[measured(images) for images in sizes] for _ in range(ROUNDS)]
    found = []
    for same in zip(*rounds):
        builds = [each['cpu_seconds']['build'] for each in same]
        found.append(medians(list(same)) | dict(builds=builds))
    return dict(hardware=hardware(), load_average=os.getloadavg(), rounds=ROUNDS, sizes=found)


if __name__ == '__main__':
    if sys.argv[1:2] == ['--one']:
        one(int(sys.argv[2]), sys.argv[3])
    else:
        counts = [int(a) for a in sys.argv[1:] if a.isdigit()] or [701, 2803, 11212]
        result = main(counts)
        for out in [a for a in sys.argv[1:] if not a.isdigit()]:
            Path(out).write_text(json.dumps(result, indent=1) + '\n')
