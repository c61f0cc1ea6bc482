"""Five distillations at 224 px on CPUs, under the plan's rule for the shipped network (ANALYSIS_PLAN.md, section 9).

The GPU's time ended after one distillation, and its teachers' weights were lost. Teachers here are three seeds of each
network whose weights exist: EfficientNetV2-B0 seeds 0, 8 and 9, ResNet-18 seeds 9, 10 and 11. Teaching on the films of
every step would cost a CPU three times as much as the students' own training. So each training film is augmented
twelve times before, the teachers answer these copies once, and a student sees each copy in one of its twelve epochs,
in an order of its own.

    teach    ResNet-18 seeds 10 and 11, as the other seeds; they meet no test
    soften   the augmented copies and the teachers' logits on them
    distil   the students; each meets its test and the other hospital once

--out gets second_edition.json and seeds.npz, written anew after each training; weights and copies lie in --work. A
call that was killed goes on with its last epoch or its last copy.

usage: distil_large.py EARLIER [EARLIER ...] --part teach|soften|distil --out FOLDER [--work FOLDER]
       [--only 1,3] [--threads 2]
EARLIER: folders with the second_edition.json of all teachers. --only: seeds, or copies of `soften`, of this process.
CXR_DATA has to hold chest_xray, chest_xray_matches.csv, nih_chestxray14 and weights.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from fastai.vision.all import Callback, TensorCategory, TensorImageBW
from safetensors.torch import load_file
from second_edition import Job, candidates, distil_jobs, network_job, network_of, training_pixels
from shape_grid import ResumingBench, begin, parser_of, say, train_missing

from cxr_study.core.run import atomic_write
from cxr_study.data.images import Preprocess
from cxr_study.train.loaders import AUGMENTATION_STEPS, ImageRows
from cxr_study.train.recipe import Keeper, fit_learner
from cxr_study.train.training import TrainingData, learner

STORED = Path(__file__).parent / '../results/second_edition/chest_xray-tf_efficientnetv2_b0/seed0'
TEACHERS = dict(tf_efficientnetv2_b0=(0, 8, 9), resnet18=(9, 10, 11))
NEW = (10, 11)  # ResNet-18s that only teach
COPIES = 12  # As many as a student has epochs
BATCH = 64
SEEDS = range(1, 6)  # Seed 0 is the GPU's, whose teachers were others


def teacher_jobs(name):  # Of the recipe
    choices = candidates('chest_xray')[name] | dict(size=224)
    jobs = [network_job('resnet18', 'chest_xray', name, seed, choices) for seed in NEW]
    return [dataclasses.replace(job, part='teach') for job in jobs]


def teachers_among(calls):  # Facts of finished calls
    "Job, slope and intercept of each teacher"
    wanted = {(arch, seed) for arch, seeds in TEACHERS.items() for seed in seeds}
    found = {}
    for entry in (entry for call in calls for entry in call['jobs']):
        job = entry['job']
        name = (job['arch'], job['seed'])
        if job['part'] in ('seeds', 'teach') and job['data'] == 'chest_xray' and name in wanted:
            found[name] = dict(job=job, slope=entry['slope'], intercept=entry['intercept'])
    missing = wanted - set(found)
    if missing:
        raise SystemExit(f"EARLIER lacks the teachers {sorted(missing)}.")
    return [found[name] for name in sorted(wanted)]


@torch.no_grad()
def answers(networks, teachers, images):  # uint8 [n, 1, H, W]
    "Mean of the teachers' calibrated logits [n]"
    x = images.float() / 255
    with torch.autocast('cpu', torch.bfloat16):
        logits = [
            member['slope'] * network(x)[:, 0].float() + member['intercept']
            for network, member in zip(networks, teachers)
        ]
    return torch.stack(logits).mean(0).numpy()


class Copies(ImageRows):
    "Training films of which each epoch shows another augmented copy, labelled by the teachers"

    epoch = 0

    def __init__(self, pixels, logits, seed):  # Of each copy: uint8 [n, H, W]; float32 [n]
        n = len(logits[0])
        super().__init__(pixels[0], range(n), np.zeros(n), train=True)
        self.pixels = pixels
        self.soft = 1 / (1 + np.exp(-np.stack(logits)))
        order = np.tile(np.arange(len(pixels))[:, None], n)
        self.order = np.random.default_rng(seed).permuted(order, axis=0)

    def batch(self, idxs):
        idxs = np.asarray(idxs)
        copies = self.order[self.epoch, idxs]
        x = np.stack([self.pixels[copy][i] for copy, i in zip(copies, idxs)])
        y = self.soft[copies, idxs].astype(np.float32)
        return TensorImageBW(torch.from_numpy(x)[:, None]), TensorCategory(torch.from_numpy(y))


class NextCopy(Callback):
    "Show the copies of this epoch"

    def before_train(self):
        self.dls.train.dataset.epoch = self.epoch


class LargeBench(ResumingBench):
    "Students see the augmented copies; networks that only teach meet no test"

    def tests(self, job):
        return super().tests(job) if job.part == 'distil' else {}

    def network(self, member):
        "A teacher's network"
        job = Job(**member['job'])
        path = self.path(job)
        if (job.arch, job.seed) == ('tf_efficientnetv2_b0', 0):
            stored = load_file(STORED / 'model.safetensors')
            torch.save({name: v.float() for name, v in stored.items()}, path)
        return network_of(job, path, self.device)

    def soften(self, job, copy):
        "One augmented copy of the training films of a student, and the teachers' answers to it"
        images, versions = training_pixels(self.films(job.data), job)
        films = images[: len(images) - len(versions['plain'])]
        networks = [self.network(member) for member in job.teachers]
        (augment,) = AUGMENTATION_STEPS['stretch_wide']()
        torch.manual_seed(copy)
        pixels, logits = np.empty_like(films), np.empty(len(films), np.float32)
        for start in range(0, len(films), BATCH):
            part = slice(start, start + BATCH)
            x = torch.from_numpy(films[part])[:, None] / 255
            drawn = torch.Tensor(augment.encodes(TensorImageBW(x)))
            drawn = (255 * drawn).round().byte()
            pixels[part] = drawn[:, 0]
            logits[part] = answers(networks, job.teachers, drawn)
            if start % (16 * BATCH) == 0:
                say(f"copy {copy}: {start:,} of {len(films):,} films")
        for name, array in dict(pixels=pixels, logits=logits).items():
            with atomic_write(self.copy_path(name, copy)) as f:
                with open(f, 'wb') as stream:
                    np.save(stream, array)

    def copy_path(self, name, copy):
        return self.folder / f'{name}-{copy}.npy'

    def fit(self, training, job, pixels, table):
        if job.part != 'distil':
            return super().fit(training, job, pixels, table)
        recipe = dataclasses.replace(training.recipe, augment='none')  # The copies are augmented
        training = dataclasses.replace(training, recipe=recipe)
        data = TrainingData(pixels, table, Preprocess(job.size, standardise='image'))
        learn = learner(training, data, self.device)
        copies = range(COPIES)
        learn.dls.train.dataset = Copies(
            [np.load(self.copy_path('pixels', c), mmap_mode='r') for c in copies],
            [np.load(self.copy_path('logits', c)) for c in copies],
            job.seed,
        )
        learn.add_cb(NextCopy())
        checkpoint = self.folder / f'{job.key}.pt'
        history = fit_learner(learn, recipe, Keeper(checkpoint, job.key, say), job.seed)
        checkpoint.unlink(missing_ok=True)
        return learn.model.eval(), history


def main(arguments=None):
    parser = parser_of(__doc__)
    parser.add_argument('--part', choices=['teach', 'soften', 'distil'], required=True)
    parser.add_argument('--only', default='', help="seeds, or copies of `soften`")
    options = parser.parse_args(arguments)
    bench, kept, earlier = begin(options, LargeBench)
    only = [int(n) for n in options.only.split(',') if n]
    recipe = earlier[0]['choice']['chest_xray']['chosen']
    finished = {entry['key'] for entry in kept.facts['jobs']}
    if options.part == 'teach':
        wanted = teacher_jobs(recipe)
    else:
        teachers = tuple(teachers_among(earlier))
        student = dataclasses.replace(distil_jobs({'chest_xray': recipe})[0], teachers=teachers)
        wanted = [dataclasses.replace(student, seed=seed) for seed in SEEDS]
    if options.part == 'soften':
        for copy in only or range(COPIES):
            if not bench.copy_path('logits', copy).exists():
                bench.soften(student, copy)
        return
    wanted = [job for job in wanted if job.seed in (only or [job.seed])]
    train_missing(bench, kept, [job for job in wanted if job.key not in finished])


if __name__ == '__main__':
    main()
