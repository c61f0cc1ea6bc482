"Training in processes: killed and resumed, divided among two processes, and with an array too large to copy"

import dataclasses
import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import gpu
import numpy as np
import pandas as pd
import pytest
import torch
from two_processes import drawn

from cxr_study.data.images import Preprocess
from cxr_study.train import recipe as recipes
from cxr_study.train.loaders import LoaderSettings, dataloaders
from cxr_study.train.networks import Classifier, create_body
from cxr_study.train.recipe import (
    BFloat16,
    Keeper,
    Recipe,
    fit_learner,
    mixed_precision,
    print_progress,
)
from cxr_study.train.training import Training, TrainingData, learner, train

SPEC = Preprocess(size=32)
SMALL = Training(
    'test_resnet',
    recipe=Recipe(
        epochs=4, batch_size=16, lr=1e-3, precision='fp32', ema=0.9, mix='mixup', augment='exposure'
    ),
)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "A memory map of 160 images, of which those with label 1 have a brighter half, and its table"
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
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
    return TrainingData(images, table, SPEC)


TRAIN = """
import json, sys, torch, numpy as np, pandas as pd
from pathlib import Path
from unittest import mock
from cxr_study.data.images import Preprocess
from cxr_study.train.recipe import Keeper, Recipe
from cxr_study.train.training import Training, TrainingData, train
Keeper.every = 0.
job = json.loads(Path(sys.argv[1]).read_text())
images = np.memmap(job['images'], np.uint8, 'r', shape=(160, 32, 32))
data = TrainingData(images, pd.DataFrame(job['table']), Preprocess(size=32))
training = Training('test_resnet', recipe=Recipe(**job['recipe']))
print('ready', flush=True)
model, _ = train(training, data, Path(job['checkpoint']), device=torch.device('cpu'))
torch.save(model.state_dict(), job['weights'])
"""


def start(data, folder):
    "A process that trains `SMALL`; it is returned when its imports are done"
    job = dict(
        images=str(data.images.filename),
        table=data.table.to_dict('list'),
        recipe=vars(SMALL.recipe),
        checkpoint=str(folder / 'c.pt'),
        weights=str(folder / 'w.pt'),
    )
    (folder / 'job.json').write_text(json.dumps(job))
    process = subprocess.Popen(
        [sys.executable, '-c', TRAIN, str(folder / 'job.json')],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == 'ready\n', process.stderr.read()
    return process


def seconds_to_train(data, folder):
    "How long a training takes that nobody kills"
    process = start(data, folder)
    began = time.time()
    assert process.wait(120) == 0
    return time.time() - began


def train_and_kill(data, folder, most_seconds):
    "Train until the weights are written, killed at up to three random moments; the number of kills"
    rng = random.Random(0)
    kills = 0
    while not (folder / 'w.pt').exists():
        process = start(data, folder)
        patience = rng.uniform(0.1, 0.6) * most_seconds if kills < 3 else 120
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    return kills


def test_killed_and_resumed(data, tmp_path):
    "Killed at random moments until it ends, training gives the weights of a training that was not killed"
    (tmp_path / 'whole').mkdir()
    (tmp_path / 'killed').mkdir()
    seconds = seconds_to_train(data, tmp_path / 'whole')
    kills = train_and_kill(data, tmp_path / 'killed', seconds)
    whole = torch.load(tmp_path / 'whole/w.pt', weights_only=True)
    killed = torch.load(tmp_path / 'killed/w.pt', weights_only=True)
    assert kills > 0
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert not list((tmp_path / 'killed').glob('*.tmp*'))


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    "What each of two processes saw and drew"
    folder = tmp_path_factory.mktemp('two')
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2']
    command = [Path(__file__).parent / 'two_processes.py', folder]
    subprocess.run([*torchrun, *command], check=True, capture_output=True, timeout=120)
    return [json.loads((folder / rank).read_text()) for rank in '01']


def test_two_processes_divide_the_images(two_processes):
    "Each training image is used once an epoch, by one of two processes; all validation images are used"
    first, second = two_processes
    assert sorted(first['train'] + second['train']) == list(range(64))
    assert sorted(first['val'] + second['val']) == list(range(64, 100))


def test_two_processes_draw_differently(two_processes):
    "Augmentation and dropout differ between processes, the order of images does not; rank 0 draws as one process does"
    alone = drawn()
    first, second = two_processes
    assert alone.items() <= first.items()
    assert second['torch'] != alone['torch']
    assert second['order'] == alone['order']


def test_two_processes_learn_as_one(data, tmp_path):
    "Their validation losses are close to those of one process, and the job file is removed"
    recipe = Recipe(epochs=2, batch_size=16, lr=1e-3, precision='fp32', augment='none', dropout=0.0)
    training = Training('test_resnet', recipe=recipe)
    cpu = torch.device('cpu')
    _, one = train(training, data, tmp_path / 'one.pt', str, cpu)
    _, two = train(training, data, tmp_path / 'two.pt', str, cpu, processes=2)
    np.testing.assert_allclose(one.valid_loss, two.valid_loss, atol=0.05)
    assert not (tmp_path / 'two.json').exists()


def own_memory():
    "Megabytes that this process does not share with files"
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith('RssAnon'):
            return int(line.split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Memory is read from /proc")
def test_a_large_array_is_not_copied(tmp_path):
    "Random batches of an array of 112,120 images do not copy it into the process's own memory"
    n = 112_120
    images = np.memmap(tmp_path / 'images', np.uint8, 'w+', shape=(n, 64, 64))
    split = ['val'] * 64 + ['train'] * (n - 64)
    table = pd.DataFrame(dict(row=range(n), label=[0, 1] * (n // 2), split=split))
    before = own_memory()
    loader = dataloaders(images, table, LoaderSettings(64, 'none'), torch.device('cpu')).train
    for _, (x, _) in zip(range(200), loader):
        assert x.shape == (64, 1, 64, 64)
    assert images.nbytes / 2**20 > 400
    assert own_memory() - before < 100


def run_benchmark(*arguments):
    "Run the benchmark of a GPU in small"
    script = Path(__file__).parent.parent / 'benchmarks/gpu.py'
    command = [sys.executable, str(script), *arguments, '--tiny']
    subprocess.run(command, check=True, capture_output=True, timeout=300)


def test_the_benchmark_of_a_gpu_runs_on_a_processor(tmp_path):
    "Each part runs in small without an error; with no time left, none begins"
    out = tmp_path / 'gpu.json'
    run_benchmark('--out', str(out))
    found = json.loads(out.read_text())
    found.pop('tiny')
    for name, part in found.items():
        assert 'error' not in str(part), name
        assert 'skipped' not in str(part), name
    assert all(found['same']['found'].values())
    for part in found['parity']['found'].values():
        assert part['largest_difference'] < 1e-4


def test_no_part_of_the_benchmark_begins_without_time(tmp_path):
    out = tmp_path / 'none.json'
    gpu.main(SimpleNamespace(tiny=True, seconds=-1, parts=['speed'], out=out))
    assert 'skipped' in json.loads(out.read_text())['speed']


STEPS = {  # A small network of a family -> how the answer of `benchmarks/networks.py` begins
    "eva02_tiny_patch14_224": "works at 224: map 192x16x16",
    "xcit_nano_12_p16_224": "works at 224: map 128x14x14",
    "levit_128s": "refused: The last layer of levit_128s has features whose places are not known",
    "efficientformer_l1": "refused: The last layer of efficientformer_l1 has features",
    "hiera_tiny_224": "refused: The last layer of hiera_tiny_224 has features",
}


@pytest.mark.parametrize("arch", STEPS)
def test_a_network_takes_a_step_or_is_refused_before_the_run(arch, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from networks import step

    assert step(arch).startswith(STEPS[arch])


def test_a_beit_is_exported():
    from timm.models.beit import Beit

    from cxr_study.data.images import Preprocess
    from cxr_study.pipeline.export import run_onnx, to_onnx
    from cxr_study.train.networks import Classifier, MapBody

    sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    network = Beit(**sizes, num_classes=0, global_pool='', use_rel_pos_bias=True)
    model = Classifier(MapBody(network, prefix=1), Preprocess(32)).eval()
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32)).astype(np.uint8)
    expected = model(torch.from_numpy(images)[:, None] / 255)[:, 0].detach()
    np.testing.assert_allclose(run_onnx(to_onnx(model), images)[:, 0], expected, atol=1e-4)


# --- Progress and precision ---


def test_progress_within_an_epoch_counts_images_and_names_the_time_left(
    data, tmp_path, monkeypatch
):
    monkeypatch.setattr(Keeper, 'told_every', 0.0)
    lines = []
    training = dataclasses.replace(SMALL, recipe=Recipe(epochs=2, batch_size=16, precision='fp32'))
    train(training, data, tmp_path / 'c.pt', say=lines.append, device=torch.device('cpu'))
    temporary = [line for line in lines if line.endswith('\r')]
    found = [
        re.fullmatch(r'epoch (\d)/1  (\d+) of 128 images, (\d+) s left\r', x) for x in temporary
    ]
    assert all(found) and len(found) == 2 * 7
    assert [int(match[2]) for match in found] == 2 * list(range(16, 128, 16))
    assert len([line for line in lines if 'val AUC' in line]) == 2


def test_a_line_of_progress_is_replaced_by_the_next(capfd):
    print_progress('epoch 0/1  16 of 128 images, 3 s left\r')
    print_progress('epoch 0/1  train loss 0.5000  val loss 0.5000  val AUC 0.5000  10 images/s')
    written = capfd.readouterr().err
    assert written.count('\n') == 1 and written.index('\r') < written.index('train loss')


@pytest.fixture
def grouped():
    "A network with depthwise convolutions"
    return Classifier(create_body('mobilenetv3_small_050', 'none'), Preprocess(size=32), 0.1)


@pytest.mark.parametrize('ratio, expected', ((0.5, [BFloat16]), (0.99, []), (1.6, [])))
def test_auto_precision_of_a_grouped_network_is_what_was_measured(
    grouped, monkeypatch, ratio, expected
):
    monkeypatch.setattr(recipes, 'has_bf16', lambda device: True)
    monkeypatch.setattr(recipes, '_step_ratio', lambda model: ratio)
    found = mixed_precision('auto', grouped, torch.device('cpu'))
    assert [type(callback) for callback in found] == expected
    monkeypatch.setenv('WORLD_SIZE', '2')  # Processes would measure different times
    assert mixed_precision('auto', grouped, torch.device('cpu')) == []


def test_timing_a_step_changes_nothing(grouped):
    torch.manual_seed(3)
    before = {name: tensor.clone() for name, tensor in grouped.state_dict().items()}
    expected = torch.get_rng_state()
    assert 0 < recipes._step_ratio(grouped) < 100
    assert torch.equal(torch.get_rng_state(), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in grouped.state_dict().items())
    assert all(parameter.grad is None for parameter in grouped.parameters())


def test_a_resumed_training_keeps_the_precision_it_began_with(data, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, 'has_bf16', lambda device: True)
    arch, checkpoint, device = 'mobilenetv3_small_050', tmp_path / 'c.pt', torch.device('cpu')
    training = Training(arch, recipe=Recipe(epochs=2, batch_size=16))
    monkeypatch.setattr(recipes, '_step_ratio', lambda model: 0.5)
    learn = learner(training, data, device)
    keeper = Keeper(checkpoint, training.key(data.table), str)
    keeper.every = 0.0
    stopped = mock.patch.object(Keeper, 'stopped', lambda self: len(self.rows) == 1)
    with stopped:
        fit_learner(learn, training.recipe, keeper)
    assert torch.load(checkpoint, weights_only=True)['half'] == 'BFloat16'
    monkeypatch.setattr(recipes, '_step_ratio', lambda model: 2.0)
    again = learner(training, data, device)
    assert recipes._half_of(again) == ''
    keeper = Keeper(checkpoint, training.key(data.table), str)
    assert keeper.resume(again) == 1 and recipes._half_of(again) == 'BFloat16'
