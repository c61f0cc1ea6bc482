"""Seconds that people wait for commands: a run on 60 images of their own, a run that is finished already, and help.

Each figure is the median of five rounds, each command a process of its own. `own` draws 60 phantoms of 1024 pixels as
PNG files, trains three epochs and holds the seconds of its stages as well; each round has an empty cache. `again` calls
a finished run once more.

usage: commands.py [OUT.json]
With CXR_DATA, `again` also takes PneumoniaMNIST.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from cxr_study.core.run import hardware, to_json
from cxr_study.data.sets import phantom

ROUNDS = 5
COMMAND = str(Path(sys.executable).parent / 'cxr-study')
SHORT = ['--epochs', '1', '--limit', '300']
HELP = ['', 'run', 'sweep', 'evaluate', 'calibrate', 'predict', 'serve']


def seconds_of(arguments, folder):
    "Seconds of a command that keeps its runs and its cache in a folder"
    environment = os.environ | dict(CXR_RUNS=str(folder / 'runs'), CXR_CACHE=str(folder / 'cache'))
    start = time.perf_counter()
    subprocess.run([COMMAND, *arguments], env=environment, check=True, capture_output=True)
    return time.perf_counter() - start


def draw_images(folder, images=60, pixels=1024):
    "PNG files of phantoms, a folder for each class"
    drawn = phantom(images=images, pixels=pixels)
    for label, name in enumerate(('NORMAL', 'PNEUMONIA')):
        (folder / name).mkdir(parents=True)
        for row in np.flatnonzero(drawn.table.label == label):
            Image.fromarray(drawn.source(row)).save(folder / name / f'{row}.png')


def own_images(images):  # A folder
    "Seconds of a run on one's own images, and of each stage"
    rounds = []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / 'run'
            options = ['--dataset', str(images), '--epochs', '3', '--run-dir', str(run)]
            whole = seconds_of(['run', *options], Path(folder))
            stages = json.loads((run / 'manifest.json').read_text())['stages']
        rounds.append(dict(whole=whole) | {name: s['seconds'] for name, s in stages.items()})
        print('own', rounds[-1], flush=True)
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


def repeated(arguments):
    "Seconds of a command that was run before"
    with tempfile.TemporaryDirectory() as folder:
        seconds_of(arguments, Path(folder))
        found = statistics.median(seconds_of(arguments, Path(folder)) for _ in range(ROUNDS))
    print(arguments, found, flush=True)
    return found


def main(out):
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / 'own'
        draw_images(images)
        sets = dict(own=str(images), phantom='phantom')
        if os.environ.get('CXR_DATA'):
            sets['pneumoniamnist'] = 'pneumoniamnist'
        found = dict(
            rounds=ROUNDS,
            hardware=hardware(),
            own=own_images(images),
            again={name: repeated(['run', '--dataset', d, *SHORT]) for name, d in sets.items()},
            help={name or 'all': repeated([*name.split(), '--help']) for name in HELP},
        )
    Path(out).write_text(to_json(found, indent=1) + '\n')


if __name__ == '__main__':
    main(sys.argv[1] if len(sys.argv) > 1 else 'results/benchmarks/commands.json')
