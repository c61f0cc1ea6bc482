"""What each of several processes of a training sees and draws; test_training.py starts it with torchrun.

usage: torchrun --nproc-per-node 2 two_processes.py FOLDER
FOLDER gets a file for each process.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch

from cxr_study.train.loaders import LoaderSettings, dataloaders
from cxr_study.train.recipe import SeedEpochs
from cxr_study.train.training import _ShardedLoader


def seen():
    "Numbers of the training and validation images in this process's batches"
    images = np.arange(100, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    split = ['train'] * 64 + ['val'] * 36
    table = pd.DataFrame(dict(row=range(100), label=[0, 1] * 50, split=split))
    settings = LoaderSettings(batch_size=8, augment='none')
    found = {}
    for loader, name in zip(dataloaders(images, table, settings, 'cpu'), ('train', 'val')):
        batches = [x for x, _ in _ShardedLoader(loader, device=loader.device)]
        values = torch.cat(batches)[:, 0, 0, 0] * 255
        found[name] = [int(v) for v in values.round()]
    return found


def drawn():
    "A random number of torch, and one of the order of images, at the beginning of an epoch"
    loader = SimpleNamespace()
    seeds = SeedEpochs(3)
    seeds.learn = SimpleNamespace(epoch=2, dls=SimpleNamespace(train=loader))
    seeds.before_epoch()
    return dict(torch=float(torch.rand(())), order=loader.rng.random())


if __name__ == '__main__':
    torch.distributed.init_process_group('gloo')
    Path(sys.argv[1], os.environ['RANK']).write_text(json.dumps(seen() | drawn()))
