"Training as a process: killed at any moment and resumed, in two processes, with an array larger than it should hold"

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cxr_study.data.images import Preprocess
from cxr_study.train.loaders import dataloaders
from cxr_study.train.recipe import Recipe
from cxr_study.train.training import Training, train, train_in

SPEC = Preprocess(size=32)
SMALL = Training(
    'test_resnet',
    recipe=Recipe(
        epochs=4, batch_size=16, lr=1e-3, precision='fp32', ema=0.9, mix='mixup', augment='exposure'
    ),
)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "A memory map of 160 images in which the sick have a bright half, and its table"
    folder, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    images = np.memmap(folder / 'images', np.uint8, 'w+', shape=(160, 32, 32))
    images[:] = rng.integers(0, 200, images.shape)
    images[1::2, 16:] += 40
    images.flush()
    table = pd.DataFrame(
        dict(
            image_id=[f"i{i}" for i in range(160)],
            patient_id=[f"p{i // 2}" for i in range(160)],
            row=range(160),
            label=[0, 1] * 80,
            split=['val'] * 32 + ['train'] * 128,
        )
    )
    return images, table


SCRIPT = """
import json, sys, torch, numpy as np, pandas as pd
from pathlib import Path
from cxr_study.data.images import Preprocess
from cxr_study.train.recipe import Keeper, Recipe
from cxr_study.train.training import Training, train
Keeper.every = 0.
job = json.loads(Path(sys.argv[1]).read_text())
images = np.memmap(job['images'], np.uint8, 'r', shape=(160, 32, 32))
training = Training('test_resnet', recipe=Recipe(**job['recipe']))
print('ready', flush=True)
model, _ = train(training, images, pd.DataFrame(job['table']), Preprocess(size=32), Path(job['checkpoint']), device=torch.device('cpu'))
torch.save(model.state_dict(), job['weights'])
"""


def start(data, folder):
    "A process that trains `SMALL`, once it has imported what it needs"
    images, table = data
    job = dict(
        images=str(images.filename),
        table=table.to_dict('list'),
        recipe=vars(SMALL.recipe),
        checkpoint=str(folder / 'c.pt'),
        weights=str(folder / 'w.pt'),
    )
    (folder / 'job.json').write_text(json.dumps(job))
    process = subprocess.Popen(
        [sys.executable, '-c', SCRIPT, str(folder / 'job.json')],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == 'ready\n', process.stderr.read()
    return process


def test_killed_and_resumed(data, tmp_path):
    "Killed at random moments until it ends, training leaves the weights of a training that nobody disturbed"
    (tmp_path / 'whole').mkdir()
    (tmp_path / 'killed').mkdir()
    whole, began = start(data, tmp_path / 'whole'), time.time()
    assert whole.wait(120) == 0
    length, rng, kills = time.time() - began, random.Random(0), 0
    while not (tmp_path / 'killed/w.pt').exists():
        process = start(data, tmp_path / 'killed')
        try:
            process.wait(rng.uniform(0.1, 0.6) * length if kills < 3 else 120)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    a, b = (torch.load(tmp_path / name / 'w.pt', weights_only=True) for name in ('whole', 'killed'))
    assert kills and all(torch.equal(a[k], b[k]) for k in a)
    assert not list((tmp_path / 'killed').glob('*.tmp*'))


SEEN = """
import os, sys, json, numpy as np, pandas as pd, torch
from pathlib import Path
from cxr_study.train.loaders import dataloaders
from cxr_study.train.training import ShardedLoader
torch.distributed.init_process_group('gloo')
images = np.arange(100, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
table = pd.DataFrame(dict(row=range(100), label=[0, 1]*50, split=['train']*64 + ['val']*36))
dls = dataloaders(images, table, 8, 'none', torch.device('cpu'))
seen = {name: [int(v) for x, _ in ShardedLoader(dl, device=dl.device) for v in (x[:, 0, 0, 0]*255).round()] for name, dl in zip(('train', 'val'), dls)}
Path(sys.argv[1], os.environ['RANK']).write_text(json.dumps(seen))
"""


def test_two_processes_divide_the_images(tmp_path):
    "Each training image is seen once an epoch, by one of two gloo ranks; validation images all are"
    subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc-per-node=2',
            '--no-python',
            sys.executable,
            '-c',
            SEEN,
            str(tmp_path),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    ranks = [json.loads((tmp_path / r).read_text()) for r in '01']
    assert sorted(ranks[0]['train'] + ranks[1]['train']) == list(range(64))
    assert sorted(ranks[0]['val'] + ranks[1]['val']) == list(range(64, 100))


DRAWN = """
import os, sys, json, torch
from pathlib import Path
from types import SimpleNamespace
from cxr_study.train.recipe import SeedEpochs
if int(os.environ.get('WORLD_SIZE', 1)) > 1: torch.distributed.init_process_group('gloo')
loader = SimpleNamespace()
seeds = SeedEpochs(3)
seeds.learn = SimpleNamespace(epoch=2, dls=SimpleNamespace(train=loader))
seeds.before_epoch()
Path(sys.argv[1], os.environ.get('RANK', 'alone')).write_text(json.dumps(dict(torch=float(torch.rand(())), order=loader.rng.random())))
"""


def test_two_processes_draw_differently(tmp_path):
    "Augmentation and dropout differ between the ranks, the order of images does not; rank 0 draws as one process does"
    subprocess.run(
        [sys.executable, '-c', DRAWN, str(tmp_path)], check=True, capture_output=True, timeout=120
    )
    subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc-per-node=2',
            '--no-python',
            sys.executable,
            '-c',
            DRAWN,
            str(tmp_path),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    alone, first, second = (
        json.loads((tmp_path / name).read_text()) for name in ('alone', '0', '1')
    )
    assert first == alone
    assert second['torch'] != alone['torch'] and second['order'] == alone['order']


def test_two_processes_learn_as_one(data, tmp_path):
    images, table = data
    training = Training(
        'test_resnet',
        recipe=Recipe(
            epochs=2, batch_size=16, lr=1e-3, precision='fp32', augment='none', dropout=0.0
        ),
    )
    cpu = torch.device('cpu')
    _, one = train(training, images, table, SPEC, tmp_path / 'one.pt', str, cpu)
    _, two = train_in(2)(training, images, table, SPEC, tmp_path / 'two.pt', str, cpu)
    np.testing.assert_allclose(one.valid_loss, two.valid_loss, atol=0.05)
    assert not (tmp_path / 'two.json').exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Memory is read from /proc")
def test_a_large_array_is_held_once(tmp_path):
    "Random batches of an array of 112,120 images do not copy it into the process's own memory"

    def anonymous():
        return (
            next(
                int(line.split()[1])
                for line in Path('/proc/self/status').read_text().splitlines()
                if line.startswith('RssAnon')
            )
            / 1024
        )

    images = np.memmap(tmp_path / 'images', np.uint8, 'w+', shape=(112_120, 64, 64))
    table = pd.DataFrame(
        dict(row=range(112_120), label=[0, 1] * 56_060, split=['val'] * 64 + ['train'] * 112_056)
    )
    before = anonymous()
    for _, (x, y) in zip(
        range(200), dataloaders(images, table, 64, 'none', torch.device('cpu')).train
    ):
        assert x.shape == (64, 1, 64, 64)
    assert images.nbytes / 2**20 > 400 and anonymous() - before < 100


def test_the_benchmark_of_a_gpu_runs_on_a_processor(tmp_path):
    "All parts in small, none of which may fail; with no time left, none begins"
    script = Path(__file__).parent.parent / 'benchmarks/gpu.py'
    subprocess.run(
        [sys.executable, str(script), '--tiny', '--out', str(tmp_path / 'gpu.json')],
        check=True,
        capture_output=True,
        timeout=300,
    )
    found = json.loads((tmp_path / 'gpu.json').read_text())
    assert not [
        name
        for name, part in found.items()
        if name != 'tiny' and ('error' in str(part) or 'skipped' in str(part))
    ]
    assert all(found['same']['found'].values())
    assert all(part['largest_difference'] < 1e-4 for part in found['parity']['found'].values())
    subprocess.run(
        [
            sys.executable,
            str(script),
            'speed',
            '--tiny',
            '--seconds',
            '-1',
            '--out',
            str(tmp_path / 'none.json'),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    assert 'skipped' in json.loads((tmp_path / 'none.json').read_text())['speed']
