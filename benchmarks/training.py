"""Training speed on this machine: what the study's batches cost, and what a loader costs that decodes files.

  step      an epoch's training time over the time of as many forward, backward and optimiser steps on one batch
            that lies ready; at most 1.10 is asked
  fastai    images/s of this study and of fastai's ImageDataLoaders.from_folder on the same JPEG files, whole
            training and input alone
  medmnist  the same against a Dataset of PIL images with torchvision transforms, as MedMNIST's training script
            does, on PneumoniaMNIST
  precision images/s in float32 and bfloat16 by network, which is what `precision=auto` rests on
  batches   images/s by batch size: 16, 64 and 256 on a processor, 64, 256 and 512 on a GPU
  memory    resident memory while batches are drawn at random from an array of 112,120 images of 224 px
  scale     seconds an image and memory for 1, 4 and 16 times as many images

usage: training.py [PART ...] [--size 224] [--arch resnet18] [--steps 8] [--out results/benchmarks/training.json]
CXR_DATA has to hold chest_xray and pneumoniamnist for the parts that read real files.
"""

import argparse
import json
import os
import platform
import tempfile
import time
import warnings
from pathlib import Path

warnings.filterwarnings('ignore')
import numpy as np
import pandas as pd
import torch
from fastai.vision.all import (
    Callback,
    CrossEntropyLossFlat,
    ImageDataLoaders,
    Learner,
    Resize,
    ResizeMethod,
    aug_transforms,
    default_device,
)
from PIL import Image
from torch import nn
from torchvision import transforms
from torchvision.models import resnet18

from cxr_study.core.run import atomic_write, hardware, to_json
from cxr_study.data.images import Preprocess
from cxr_study.data.sets import load_dataset
from cxr_study.train.loaders import LoaderSettings, dataloaders
from cxr_study.train.recipe import Recipe
from cxr_study.train.training import Training, TrainingData, learner

BATCH = 64


def drawn_images(n, size, file=None):
    "uint8 [n, size, size] of noise, and its table: one batch is validation"
    shape, rng = (n, size, size), np.random.default_rng(0)
    images = np.memmap(file, np.uint8, 'w+', shape=shape) if file else np.empty(shape, np.uint8)
    for i in range(0, n, 1024):
        images[i : i + 1024] = rng.integers(
            0, 255, (len(images[i : i + 1024]), size, size), np.uint8
        )
    return images, rows(n)


def rows(n):
    return pd.DataFrame(
        dict(
            row=range(n),
            image_id=[str(i) for i in range(n)],
            label=[0, 1] * (n // 2),
            split=['val'] * BATCH + ['train'] * (n - BATCH),
        )
    )


class Clock(Callback):
    "Seconds of the training part of each epoch"

    order = 95

    def before_train(self):
        wait(self.dls.device)
        self.start = time.perf_counter()

    def after_train(self):
        wait(self.dls.device)
        self.seconds = getattr(self, 'seconds', []) + [time.perf_counter() - self.start]


def wait(device):
    if device.type == 'cuda':
        torch.cuda.synchronize()


def epochs(learn, n=2):
    "Seconds of each of `n` training epochs"
    clock = Clock()
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(n, [1e-3] * len(learn.opt.hypers) if learn.opt else 1e-3, cbs=[clock])
    return clock.seconds


def study_learner(arch, images, table, size, **choices):
    training = Training(arch, recipe=Recipe(batch_size=BATCH, **choices))
    return learner(training, TrainingData(images, table, Preprocess(size=size)))


def step(arch, size, steps):
    "An epoch against as many steps on a resident batch, taken in turns"
    images, table = drawn_images(BATCH * (steps + 1), size)
    learn = study_learner(arch, images, table, size)
    x, y = (torch.Tensor(b) for b in learn.dls.one_batch())
    learn.create_opt()
    model, bf16 = learn.model.train(), any(cb.name == 'b_float16' for cb in learn.cbs)

    def resident():
        for _ in range(steps):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
                loss = learn.loss_func(model(x), y)
            loss.backward()
            learn.opt.step()
            learn.opt.zero_grad()

    resident()
    found = []
    for _ in range(3):
        wait(x.device)
        start = time.perf_counter()
        resident()
        wait(x.device)
        bare, epoch = time.perf_counter() - start, min(epochs(learn))
        found.append(dict(bare_s=bare, epoch_s=epoch, ratio=epoch / bare))
    best = sorted(found, key=lambda f: f['ratio'])[1]
    return dict(
        best, arch=arch, size=size, bf16=bf16, images_per_second=steps * BATCH / best['epoch_s']
    )


def inputs(loader, batches):
    "Images/s of drawing batches, after the first"
    it = iter(loader)
    x, _ = next(it)
    wait(x.device)
    start = time.perf_counter()
    n = sum(len(next(it)[0]) for _ in range(batches))
    wait(x.device)
    return n / (time.perf_counter() - start)


def fastai_stock(arch, size, steps):
    "Both in this process, on the same JPEG files, with the same augmentation"
    source, tfms = (
        load_dataset('chest_xray'),
        aug_transforms(do_flip=False, max_rotate=10, max_zoom=1.15, max_warp=0.1, max_lighting=0.3),
    )
    part = source.table.sample(BATCH * (steps + 1), random_state=0)
    with tempfile.TemporaryDirectory() as folder:
        for k, (i, row) in enumerate(part.iterrows()):
            place = Path(folder) / ('valid' if k < BATCH else 'train') / str(row.label)
            place.mkdir(parents=True, exist_ok=True)
            (place / f'{k}.jpeg').symlink_to(source.source(i))
        dls = ImageDataLoaders.from_folder(
            folder, item_tfms=Resize(size, ResizeMethod.Squish), batch_tfms=tfms, bs=BATCH
        )
        plain = ImageDataLoaders.from_folder(
            folder, item_tfms=Resize(size, ResizeMethod.Squish), bs=BATCH
        )
        stock = Learner(dls, resnet18(num_classes=2), loss_func=CrossEntropyLossFlat())
        theirs = dict(
            training=steps * BATCH / min(epochs(stock)),
            input=inputs(plain.train, steps - 2),
            input_augmented=inputs(dls.train, steps - 2),
        )
    start = time.perf_counter()
    images = np.stack([Preprocess(size=size)(source.source(i)) for i in part.index])
    decode = time.perf_counter() - start
    table = rows(len(images)).assign(label=part.label.to_numpy())
    ours_dls = {
        augment: dataloaders(images, table, LoaderSettings(BATCH, augment))
        for augment in ('none', 'standard')
    }
    ours = dict(
        training=steps * BATCH / min(epochs(study_learner('resnet18', images, table, size))),
        input=inputs(ours_dls['none'].train, steps - 2),
        input_augmented=inputs(ours_dls['standard'].train, steps - 2),
    )
    return dict(
        size=size,
        fastai=theirs,
        study=ours,
        ratio={k: ours[k] / theirs[k] for k in ours},
        decode_once_images_per_second=len(images) / decode,
    )


class PILDataset(torch.utils.data.Dataset):
    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i]).convert('RGB')), self.labels[i]


def medmnist(arch, size, steps, pixels=28):
    """PneumoniaMNIST at 28 px, ResNet-18, batches of 64: the loop of MedMNIST's script against a fastai epoch of
    the study"""
    source = load_dataset('pneumoniamnist')
    n = BATCH * (4 * steps + 1)
    images = np.stack([Preprocess(size=pixels)(source.source(i)) for i in source.table.index[:n]])
    labels = source.table.label.to_numpy()[:n]
    data = PILDataset(
        images[BATCH:],
        labels[BATCH:],
        transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]),
    )
    loader = torch.utils.data.DataLoader(data, BATCH, shuffle=True, drop_last=True)
    model, criterion = resnet18(num_classes=2).to(default_device()), nn.CrossEntropyLoss()
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)

    def epoch():
        start = time.perf_counter()
        for x, y in loader:
            optimiser.zero_grad()
            criterion(model(x.to(default_device())), y.to(default_device())).backward()
            optimiser.step()
        wait(default_device())
        return time.perf_counter() - start

    theirs = dict(
        training=len(data) / min(epoch() for _ in range(2)), input=inputs(loader, 3 * steps)
    )
    table = rows(len(images)).assign(label=labels)
    ours = dict(
        training=len(data)
        / min(epochs(study_learner('resnet18', images, table, pixels, augment='none'))),
        input=inputs(dataloaders(images, table, LoaderSettings(BATCH, 'none')).train, 3 * steps),
    )
    return dict(
        size=pixels, medmnist=theirs, study=ours, ratio={k: ours[k] / theirs[k] for k in ours}
    )


def precision(arch, size, steps):
    found = []
    for name, pixels in ((arch, size), ('tf_efficientnetv2_b0', 160), ('efficientnet_b0', size)):
        images, table = drawn_images(BATCH * (steps // 2 + 1), pixels)
        speed = {
            p: (steps // 2)
            * BATCH
            / min(epochs(study_learner(name, images, table, pixels, precision=p)))
            for p in ('fp32', 'bf16')
        }
        found.append(dict(arch=name, size=pixels, **speed))
    return found


def batches(arch, size, steps):
    "The same number of images in batches of several sizes"
    found = {}
    for bs in (64, 256, 512) if default_device().type == 'cuda' else (16, 64, 256):
        n = max(1, steps * BATCH // bs)
        images, table = drawn_images(BATCH + n * bs, size)
        data = TrainingData(images, table, Preprocess(size=size))
        learn = learner(Training(arch, recipe=Recipe(batch_size=bs)), data)
        found[bs] = n * bs / min(epochs(learn))
    return dict(arch=arch, size=size, images_per_second=found)


def resident_mb():
    "Anonymous and file-backed resident memory of this process, MB"
    found = dict(line.split(':') for line in Path('/proc/self/status').read_text().splitlines())
    return {k: int(found[k].split()[0]) / 1024 for k in ('RssAnon', 'RssFile')}


def memory(arch, size, steps, n=112_120):
    """Batches at random from a sparse array as large as NIH ChestX-ray14's; resident memory may grow by one copy,
    in the file's own pages"""
    with tempfile.TemporaryDirectory(dir=os.environ.get('TMPDIR')) as folder:
        images, table = (
            np.memmap(f'{folder}/images', np.uint8, 'w+', shape=(n, size, size)),
            rows(n),
        )
        before, dls = resident_mb(), dataloaders(images, table, LoaderSettings(BATCH, 'none'))
        it, most = iter(dls.train), dict(before)
        for _ in range(400):
            next(it)
            now = resident_mb()
            most = {k: max(most[k], now[k]) for k in now}
    return dict(
        images=n,
        array_mb=images.nbytes / 2**20,
        anonymous_grew_mb=most['RssAnon'] - before['RssAnon'],
        file_pages_grew_mb=most['RssFile'] - before['RssFile'],
    )


def scale(arch, size, steps):
    found = []
    for times in (1, 4, 16):
        images, table = drawn_images(BATCH * (8 * times + 1), 64)
        learn = study_learner(arch, images, table, 64)
        found.append(
            dict(
                images=len(images),
                seconds_an_image=min(epochs(learn)) / (8 * times * BATCH),
                anonymous_mb=resident_mb()['RssAnon'],
            )
        )
    return found


PARTS = dict(
    step=step,
    fastai=fastai_stock,
    medmnist=medmnist,
    precision=precision,
    batches=batches,
    memory=memory,
    scale=scale,
)


def flat(value, path=''):
    "(name, number) of everything in nested dictionaries and lists"
    if isinstance(value, dict):
        return [x for k, v in value.items() for x in flat(v, f'{path} {k}')]
    if isinstance(value, list):
        return [x for k, v in enumerate(value) for x in flat(v, f'{path} {k}')]
    return [(path.strip(), value)]


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'parts', nargs='*', metavar='PART', help=f"of {', '.join(PARTS)}; default: all"
    )
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--arch', default='resnet18')
    parser.add_argument('--steps', type=int, default=8)
    parser.add_argument('--out', type=Path, default=Path('results/benchmarks/training.json'))
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    found = json.loads(args.out.read_text()) if args.out.is_file() else {}
    for name in args.parts or PARTS:
        found[name] = PARTS[name](args.arch, args.size, args.steps)
        for label, value in flat(found[name], name):
            print(
                f"{label:60} {value:.4g}" if isinstance(value, float) else f"{label:60} {value}",
                flush=True,
            )
    found['hardware'] = dict(hardware(), processor=platform.processor())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.out) as f:
        f.write_text(to_json(found))
