"""Does self-supervised pretraining on the training images beat training from scratch? SimSiam (Chen and He, 2021)
through lightly, judged on validation
patients under stress (see nbs/results/04_recipes), against scratch at the same number of fine-tuning epochs and at
the same total number of passes.

usage: pretraining.py [--arch resnet18] [--epochs 3] [--pretrain 3] [--seeds 3] [--out results/pretraining.csv]
Needs lightly (pip install --no-deps lightly) and chest_xray in CXR_DATA. Finished trainings are not repeated.
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path

warnings.filterwarnings('ignore')
import numpy as np
import pandas as pd
import torch
from compare_recipes import Cell, mean_interval, real_images, run_cell
from fastai.vision.all import TensorImageBW
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead
from torch import nn

from cxr_study.core.run import atomic_write, seed_everything
from cxr_study.data.images import Preprocess
from cxr_study.train.loaders import AUGMENTATION_STEPS
from cxr_study.train.networks import Classifier, create_body
from cxr_study.train.recipe import Recipe
from cxr_study.train.training import Training


class SimSiam(nn.Module):
    "Two views of an image should predict each other: encoder, projection, prediction"

    def __init__(self, encoder, channels):
        super().__init__()
        self.encoder, self.project, self.predict = (
            encoder,
            SimSiamProjectionHead(channels, 512, 256),
            SimSiamPredictionHead(256, 128, 256),
        )

    def forward(self, x):
        z = self.project(self.encoder.head[:2](self.encoder.maps(x)))
        return z.detach(), self.predict(z)


def pretrain(arch, images, rows, spec, epochs, seed, bs=64, lr=1e-3):
    "The body's weights after `epochs` of SimSiam on these rows; no label is read"
    seed_everything(seed)
    classifier = Classifier(create_body(arch), spec)
    model = (
        SimSiam(classifier, classifier.head[3].in_features)
        .to(memory_format=torch.channels_last)
        .train()
    )
    loss_of, views, rng = (
        NegativeCosineSimilarity(),
        AUGMENTATION_STEPS['shift'](),
        np.random.default_rng(seed),
    )
    optimiser = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, lr, total_steps=epochs * (len(rows) // bs)
    )
    for epoch in range(epochs):
        order, losses = rng.permutation(rows), []
        for k in range(len(rows) // bs):
            x = TensorImageBW(
                torch.from_numpy(images[np.sort(order[k * bs : (k + 1) * bs])])[:, None].float()
                / 255
            )
            pair = []
            for _ in range(2):
                view = x
                for t in views:
                    view = t(view, split_idx=0)
                pair.append(torch.Tensor(view))
            with torch.autocast('cpu', torch.bfloat16):
                (z0, p0), (z1, p1) = model(pair[0]), model(pair[1])
            loss = (loss_of(p0.float(), z1.float()) + loss_of(p1.float(), z0.float())) / 2
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
        print(f"pretraining epoch {epoch}: loss {np.mean(losses):.3f}", flush=True)
    return classifier.body.state_dict()


def saved(arch, body, path):
    "The body as a file that `weights=` takes: a whole network with an untrained classifier"
    import torchvision
    from safetensors.torch import save_file

    net = torchvision.models.get_model(arch)
    nn.Sequential(*list(net.children())[:-2]).load_state_dict(body)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, path)
    return str(path)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--arch', default='resnet18')
    parser.add_argument('--epochs', type=int, default=3)
    parser.add_argument('--pretrain', type=int, default=3)
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--out', type=Path, default=Path('results/pretraining.csv'))
    args = parser.parse_args()
    spec, done = (
        Preprocess(size=64),
        pd.read_csv(args.out).to_dict('records') if args.out.is_file() else [],
    )
    images, table = real_images(spec)
    train_rows = table[table.split == 'train'].row.to_numpy()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            arms = {
                f'scratch, {args.epochs} epochs': (args.epochs, False),
                f'scratch, {args.epochs + 2 * args.pretrain} epochs': (
                    args.epochs + 2 * args.pretrain,
                    False,
                ),
                f'SimSiam {args.pretrain} epochs, then {args.epochs}': (args.epochs, True),
            }  # Two views an image: a pretraining epoch is two passes
            for name, (epochs, simsiam) in arms.items():
                if any(r['cell'] == name and r['seed'] == seed for r in done):
                    continue
                start = time.time()
                weights = (
                    saved(
                        args.arch,
                        pretrain(args.arch, images, train_rows, spec, args.pretrain, seed),
                        Path(folder) / f'{seed}.safetensors',
                    )
                    if simsiam
                    else 'none'
                )
                extra = time.time() - start
                # As with all pretrained weights, the body then learns at a tenth of the head's rate
                cell = Cell(
                    name, Training(args.arch, weights, Recipe(epochs=epochs, lr=2e-3)), spec
                )
                row = run_cell(
                    cell, seed, lambda _: (images, table), Path(folder) / 'checkpoint.pt'
                )
                done.append(dict(row, seconds=round(row['seconds'] + extra, 1)))
                print(done[-1], flush=True)
                with atomic_write(args.out) as f:
                    pd.DataFrame(done).to_csv(f, index=False)
    for name, part in pd.DataFrame(done).groupby('cell'):
        print(
            name,
            'stress loss {:.4f} ({:.4f} to {:.4f})'.format(*mean_interval(part.stress_loss)),
            f'plain AUC {part.plain_auc.mean():.4f}',
        )
