"""Trains the networks of ANALYSIS_PLAN.md on one GPU (or a CPU) within a number of seconds, the most telling first.

  candidates  the plan's recipes, on validation alone; the plan's rule chooses one for each data set and writes it down
  grid        squash, true crop and letterbox x equalise and stretch at 64 px
  looks       the candidates on their test, after the choice
  seeds       one seed of each network in turn, until the time is used up
  distil      ResNet-18s taught by three seeds each of two networks

What is finished lies whole in --out: seeds.npz and search.npz (logits), second_edition.json (films, choice, histories,
times), weights-*.safetensors (half precision). A run that is killed leaves what was finished. Several processes share
the GPU, because small steps leave it idle.

usage: second_edition.py --out FOLDER [--seconds 400] [--processes 3] [--limit 0] [--tiny] [--parts candidates,grid,...]
CXR_DATA has to hold chest_xray, chest_xray_matches.csv, pneumoniamnist, nih_chestxray14 and weights.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import multiprocessing
import os
import queue
import tempfile
import time
import traceback
import warnings
from pathlib import Path

warnings.filterwarnings('ignore')
import numpy as np
import pandas as pd
import torch
from fastai.vision.all import Callback, default_device
from safetensors.torch import save_file
from second_edition_films import SHAPES, VERSIONS, Films, independent, marked, seven, shaped
from second_edition_rule import NEAR, choose, criterion, platt_line, wide_specificity
from sklearn.metrics import roc_auc_score

from cxr_study.core.run import atomic_write, git_state, hardware, to_json, versions
from cxr_study.data.cache import decoded
from cxr_study.data.images import Preprocess
from cxr_study.data.sets import load_dataset, sample_patients
from cxr_study.train import loaders
from cxr_study.train.networks import Classifier, create_body
from cxr_study.train.recipe import Keeper, Recipe, fit_learner
from cxr_study.train.training import Training, TrainingData, learner, predict_logits, train

REPEATS = 3  # Copies of the training films in a table that is drawn or overlaid
ROUNDS = 20  # Seeds of each network, at most
TEACHERS = 3  # Seeds of each of two networks
FILE_BYTES, ALL_BYTES = (
    15 * 2**20,
    46 * 2**20,
)  # Of a file of weights; of all, so that four files hold them


@dataclasses.dataclass(frozen=True)
class Job:
    "One training, or (part `looks`) the test of one that is finished"

    part: str  # candidates, grid, looks, seeds or distil
    data: str  # chest_xray or pneumoniamnist
    name: str  # Of the recipe
    seed: int = 0
    fold: int = 0
    arch: str = 'resnet18'
    weights: str = 'none'
    size: int = 224
    epochs: int = 12
    lr: float = 0.0
    augment: str = 'stretch'
    geometry: str = 'squash'  # squash, crop or letterbox
    balanced: bool = False  # Label and shape drawn independently
    overlay: bool = False  # Markers on a third of the films of both classes
    ema: float = 0.0
    teachers: tuple = ()  # Of a distillation: job, slope and intercept of each

    @property
    def key(self):
        return f"{self.part}-{self.data}-{self.arch}-{self.name}-seed{self.seed}"


# Recipes and networks of the plan


def candidates(data, tiny=False):
    "Name -> choices, simple to complex"
    if data == 'pneumoniamnist':
        found = dict(
            equalise=dict(size=64, augment='equalise'),
            stretch=dict(size=64),
            wide=dict(size=64, augment='stretch_wide'),
            wide_128=dict(size=128, augment='stretch_wide'),
        )
    else:
        wide = dict(size=128, augment='stretch_wide')
        changes = dict(
            crop=dict(geometry='crop'),
            balanced=dict(balanced=True),
            overlay=dict(overlay=True),
            average=dict(ema=0.98),
        )
        found = dict(stretch=dict(size=128), wide=wide) | {
            f'wide_{name}': wide | change for name, change in changes.items()
        }
        found['wide_all'] = wide | changes['balanced'] | changes['overlay'] | changes['average']
    return dict(list(found.items())[:2]) if tiny else found


def candidate_jobs(tiny=False):
    return [
        Job('candidates', data, name, seed, seed, **choices)
        for seed in range(1 if tiny else 3)
        for data in ('chest_xray', 'pneumoniamnist')
        for name, choices in candidates(data, tiny).items()
    ]


def grid_jobs(tiny=False):
    cells = [(g, a) for g in ('squash', 'crop', 'letterbox') for a in ('equalise', 'stretch')][
        : 2 if tiny else 6
    ]
    return [
        Job('grid', 'chest_xray', f'{g}_{a}', seed, geometry=g, augment=a, size=64, epochs=6)
        for seed in range(1 if tiny else 5)
        for g, a in cells
    ]


def seed_jobs(chosen, first=0, tiny=False):
    "One seed of each network in turn, from seed `first`; `chosen`: data set -> name of the recipe"
    found = []
    for seed in range(first, first + 1 if tiny else ROUNDS):
        for data in ('chest_xray', 'pneumoniamnist'):
            choices = candidates(data)[chosen[data]]
            if data == 'chest_xray':
                choices = choices | dict(size=224)
            for arch in ('resnet18', 'tf_efficientnetv2_b0'):
                found.append(network_job(arch, data, chosen[data], seed, choices))
    return found


def extra_jobs(chosen, tiny=False):
    "ResNet-50, if the seeds are through"
    choices = candidates('chest_xray')[chosen['chest_xray']] | dict(size=224)
    return [
        Job('seeds', 'chest_xray', chosen['chest_xray'], seed, arch='resnet50', **choices)
        for seed in range(0 if tiny else ROUNDS)
    ]


def network_job(arch, data, name, seed, choices):
    pretrained = (
        dict(weights='imagenet', epochs=6, lr=0.003) if arch == 'tf_efficientnetv2_b0' else {}
    )
    return Job('seeds', data, name, seed, arch=arch, **choices | pretrained)


def distil_jobs(chosen, tiny=False):
    choices = candidates('chest_xray')[chosen['chest_xray']] | dict(size=224)
    return [
        Job('distil', 'chest_xray', chosen['chest_xray'], seed, **choices)
        for seed in range(1 if tiny else 5)
    ]


def smaller(job, tiny):
    "The job at a size that a CPU trains in a second"
    if not tiny:
        return job
    arch = dict(resnet18='test_resnet', tf_efficientnetv2_b0='test_efficientnet').get(
        job.arch, job.arch
    )
    return dataclasses.replace(job, arch=arch, weights='none', size=32, epochs=min(job.epochs, 3))


@contextlib.contextmanager
def augmentation(name):
    "Lend a name that `Recipe` takes for an augmentation: the plan's wider stretching in the place of `stretch`"
    if name in loaders.AUGMENTATION_STEPS:
        yield name
        return
    before = loaders.AUGMENTATION_STEPS['stretch']
    loaders.AUGMENTATION_STEPS['stretch'] = wide
    try:
        yield 'stretch'
    finally:
        loaders.AUGMENTATION_STEPS['stretch'] = before


def wide():
    "As `stretch`, but width over height changes by a factor of up to e^0.7 instead of e^0.4"
    equalised = loaders.RandomChange(loaders.equalise, 1.0, 0.3)
    return [loaders.Augmentation(equalised, light=0.3, stretch=0.7)]


def training_pixels(films, job):
    "(uint8 images: training films, the same with markers if wanted, validation films; versions of the latter)"
    images, table = films.images(job.size, job.geometry), films.table()
    plain = images[training_rows(table, job).row.to_numpy()]
    rng = np.random.default_rng(0)
    marks = [np.stack([marked(x, rng) for x in plain])] if job.overlay else []
    versions_ = seven(images[table.row[table.fold == job.fold].to_numpy()])
    mixed = np.stack(
        [versions_[VERSIONS[i % len(VERSIONS)]][i] for i in range(len(versions_['plain']))]
    )
    return np.concatenate([plain, *marks, mixed]), versions_


def training_rows(table, job):
    return table[(table.fold != job.fold) & (table.fold != -2)]


def training_table(films, job, images):  # Number of images in `training_pixels`
    "(table with `row` and `split`, a row a film to be seen in an epoch; epochs)"
    table = films.table()
    val, train_rows = table[table.fold == job.fold], training_rows(table, job)
    at, epochs = np.arange(len(train_rows)), job.epochs
    if job.balanced or job.overlay:
        at = independent(train_rows, REPEATS, job.seed) if job.balanced else np.tile(at, REPEATS)
        epochs = max(1, round(job.epochs / REPEATS))
    rows = at.copy()
    if job.overlay:  # A third of each class
        order = np.argsort(
            train_rows.label.to_numpy()[at] + np.random.default_rng(job.seed).random(len(at))
        )
        rows[order[::3]] += len(train_rows)
    seen = train_rows.iloc[at].assign(row=rows, split='train')
    return pd.concat(
        [seen, val.assign(row=images - len(val) + np.arange(len(val)), split='val')],
        ignore_index=True,
    ), epochs


# One job


class Teacher(Callback):
    "Give a training batch the teacher's mean probability as its labels, on the same augmented films"

    order = 65

    def __init__(self, members, lines):
        self.members, self.lines = members, lines

    def before_batch(self):
        if not self.training:
            return
        x = torch.Tensor(self.xb[0])
        with (
            torch.no_grad(),
            torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == 'cuda'),
        ):
            logits = [
                slope * m(x)[:, 0].float() + intercept
                for m, (slope, intercept) in zip(self.members, self.lines)
            ]
        self.learn.yb = (torch.stack(logits).mean(0).sigmoid(),)


def network_of(job, path, device):
    "The trained network of a finished job, in evaluation mode"
    model = Classifier(create_body(job.arch), Preprocess(size=job.size, standardise='image'))
    model.load_state_dict(torch.load(path, map_location='cpu', weights_only=True))
    return model.to(device, memory_format=torch.channels_last).eval()


class Bench:
    "Films and device of one process"

    def __init__(self, folder, limit, tiny):
        self.folder, self.limit, self.tiny, self.device, self.kept = (
            Path(folder),
            limit,
            tiny,
            default_device(),
            {},
        )
        self.checkpoint = self.folder / f'checkpoint-{os.getpid()}.pt'

    def films(self, data):
        if data not in self.kept:
            self.kept[data] = Films(self.folder, data, self.limit, self.tiny)
        return self.kept[data]

    def tests(self, job):
        "Name -> uint8 [n, H, W]: the test as it is, and for published networks its shapes and the other hospital"
        published = job.part in ('seeds', 'distil')
        found = self.remembered(
            ('tests', job.data, job.size, job.geometry, published),
            lambda: self.shapes(job, published),
        )
        if published:
            found = found | dict(
                nih=self.remembered(('nih', job.size), lambda: np.array(self.elsewhere(job.size)))
            )
        return found

    def shapes(self, job, all_of_them):
        films = self.films(job.data)
        images, table = films.images(job.size, job.geometry), films.table()
        plain = images[table.row[table.fold == -2].to_numpy()]
        return {f'test/{f:g}': shaped(plain, f) for f in (SHAPES if all_of_them else (1.0,))}

    def elsewhere(self, size):
        if 'nih' not in self.kept:
            self.kept['nih'] = sample_patients(load_dataset('nih_chestxray14'), self.limit)
        return decoded(self.kept['nih'], Preprocess(size=size), self.folder / 'cache')[0]

    def remembered(self, key, make):
        "What `make()` gives, kept for the next job of the same kind"
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def logits(self, model, images):  # Name -> uint8 [n, H, W]
        bs = 64 if self.device.type == 'cpu' else 512
        return {
            name: predict_logits(model, x, np.arange(len(x)), bs, self.device).astype(np.float32)
            for name, x in images.items()
        }

    def path(self, job):
        "Where a training's weights lie; those of a look are its candidate's"
        trained = dataclasses.replace(job, part='candidates') if job.part == 'looks' else job
        return self.folder / 'weights' / f'{trained.key}.pt'

    def fit(self, training, job, pixels, table):
        "(network, history) of a training, by its labels or by its teachers"
        self.checkpoint.unlink(missing_ok=True)
        data = TrainingData(pixels, table, Preprocess(job.size, standardise='image'))
        if not job.teachers:
            return train(training, data, self.checkpoint, str, self.device)
        learn = learner(training, data, self.device)
        members = [Job(**m['job']) for m in job.teachers]
        networks = [network_of(m, self.path(m), self.device).requires_grad_(False) for m in members]
        learn.add_cb(Teacher(networks, [(m['slope'], m['intercept']) for m in job.teachers]))
        keeper = Keeper(self.checkpoint, job.key, str)
        history = fit_learner(learn, training.recipe, keeper, job.seed)
        model = learn.model.eval()
        del learn
        gc.collect()
        return model, history

    def look(self, job):
        "The test's logits of a candidate that is trained"
        found = self.logits(network_of(job, self.path(job), self.device), self.tests(job))
        self.path(job).unlink()
        return found

    def train(self, job):
        "(logits by name, facts) of a training"
        clock = [time.time()]
        if self.device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats()
        films, kind = (
            self.films(job.data),
            ('training', job.data, job.size, job.geometry, job.fold, job.overlay),
        )
        pixels, versions_ = self.remembered(kind, lambda: training_pixels(films, job))
        table, epochs = training_table(films, job, len(pixels))
        tests = {} if job.part == 'candidates' else self.tests(job)
        clock.append(time.time())
        with augmentation(job.augment) as name:
            recipe = Recipe(epochs=epochs, lr=job.lr, augment=name, ema=job.ema)
            model, history = self.fit(
                Training(job.arch, job.weights, recipe, job.seed), job, pixels, table
            )
        clock.append(time.time())
        if job.part != 'grid':
            self.path(job).parent.mkdir(exist_ok=True)
            torch.save(
                {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}, self.path(job)
            )
        found = self.logits(model, {f'val/{k}': x for k, x in versions_.items()} | tests)
        clock.append(time.time())
        seconds = dict(zip(('prepare', 'train', 'predict'), np.diff(clock).round(2).tolist()))
        val = table[table.split == 'val']
        facts = judged({k[4:]: z for k, z in found.items() if k.startswith('val/')}, val)
        if self.device.type == 'cuda':
            facts['peak_gib'] = torch.cuda.max_memory_allocated() / 2**30
        return found, facts | dict(
            seconds=seconds,
            history=history.to_dict('list'),
            films=len(table) - len(val),
            epochs=epochs,
            images_per_second=float(history.images_per_second.median()),
        )

    def run(self, job):
        "(logits by name, facts) of a job"
        started = time.time()
        if job.part != 'looks':
            return self.train(job)
        return self.look(job), dict(seconds=round(time.time() - started, 2))


def judged(z, val):  # Version -> logits [n]; the validation films
    "What the plan reads of a training on validation"
    slope, intercept = platt_line(z, val)
    return dict(
        criterion=float(criterion(z, val).mean()),
        slope=slope,
        intercept=intercept,
        valid_auc=float(roc_auc_score(val.label, z['plain'])),
        wide_specificity=wide_specificity(z['plain'], val),
    )


# What is written


class Kept:
    "Everything that is finished, written whole after each job"

    def __init__(self, out, folder, options):
        self.out, self.folder, self.started = Path(out), Path(folder), time.time()
        self.logits, self.packed = dict(seeds={}, search={}), None
        self.facts = dict(
            schema=1,
            options=options,
            versions=versions(),
            git=git_state(),
            hardware=hardware(),
            jobs=[],
            failed=[],
            choice={},
            films={},
        )
        if torch.cuda.is_available():
            self.facts['gpu'] = gpu_facts()

    def add(self, job, logits, facts):
        place = 'search' if job.part in ('candidates', 'grid', 'looks') else 'seeds'
        for name, z in logits.items():
            self.logits[place][f'{job.key}/{name}'] = z
        self.facts['jobs'].append(
            dict(
                job=dataclasses.asdict(job),
                key=job.key,
                finished=round(time.time() - self.started, 1),
                **facts,
            )
        )
        self.write(place)

    def fail(self, job, error):
        self.facts['failed'].append(dict(job=dataclasses.asdict(job), error=error))
        self.write()

    def write(self, place=None):
        "The JSON, and the logits of `place`, if it is named"
        if place:
            with atomic_write(self.out / f'{place}.npz') as f:
                with open(f, 'wb') as stream:
                    np.savez(stream, **self.logits[place])
        with atomic_write(self.out / 'second_edition.json') as f:
            f.write_text(to_json(finite(self.facts)))

    def of(self, **wanted):
        "The finished jobs whose fields are these"
        return [j for j in self.facts['jobs'] if all(j['job'][k] == v for k, v in wanted.items())]

    def shipped(self):
        "Keys of the weights to keep: the network that the plan's rule ships, then a seed of each network"
        plain = sorted(
            self.of(part='seeds', data='chest_xray', arch='resnet18'), key=lambda j: j['criterion']
        )
        distilled = sorted(self.of(part='distil'), key=lambda j: j['criterion'])
        near = [j for j in distilled if j['valid_auc'] >= self.teacher_auc(j) - NEAR]
        order = near[:1] or plain[:1]
        order += sorted(
            self.of(part='seeds', seed=0),
            key=lambda j: ('efficientnet' not in j['job']['arch'], j['job']['data']),
        )
        return list(dict.fromkeys(j['key'] for j in order))

    def teacher_auc(self, distilled):
        "Validation AUC of the mean of the teachers' calibrated logits"
        films = pd.DataFrame(self.facts['films']['chest_xray'])
        label = films.label[films.fold == distilled['job']['fold']]
        members = [
            (Job(**m['job']).key, m['slope'], m['intercept']) for m in distilled['job']['teachers']
        ]
        logits = [
            slope * self.logits['seeds'][f'{key}/val/plain'] + shift
            for key, slope, shift in members
        ]
        return roc_auc_score(label, np.mean(logits, 0))

    def pack(self):
        "Half-precision weights of `shipped`, in files of at most `FILE_BYTES`, as many networks as `ALL_BYTES` hold"
        files, size, total, names = [{}], 0, 0, []
        for key in self.shipped():
            state = {
                f'{key}/{k}': half(v)
                for k, v in torch.load(
                    self.folder / 'weights' / f'{key}.pt', weights_only=True
                ).items()
            }
            whole = sum(map(nbytes, state.values()))
            if total + whole > ALL_BYTES:
                continue
            total, names = total + whole, names + [key]
            for k, v in state.items():
                if size + nbytes(v) > FILE_BYTES:
                    files, size = files + [{}], 0
                files[-1][k], size = v, size + nbytes(v)
        if names == self.packed:
            return
        for i, tensors in enumerate(files):
            with atomic_write(self.out / f'weights-{i}.safetensors') as f:
                save_file(tensors, f)
        for i in range(len(files), 4):
            (self.out / f'weights-{i}.safetensors').unlink(missing_ok=True)
        self.packed = names


def nbytes(v):
    return v.numel() * v.element_size()


def half(v):
    return v.half().contiguous() if v.is_floating_point() and v.numel() > 2**14 else v.contiguous()


def finite(x):
    "`x` with None for numbers that are not finite"
    if isinstance(x, dict):
        return {k: finite(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [finite(v) for v in x]
    return None if isinstance(x, (float, np.floating)) and not math.isfinite(x) else x


def gpu_facts():
    return dict(
        name=torch.cuda.get_device_name(),
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        bf16=torch.cuda.is_bf16_supported(),
        tf32_convolution=torch.backends.cudnn.allow_tf32,
        tf32_matmul=torch.backends.cuda.matmul.allow_tf32,
    )


# Many jobs


def work(inbox, outbox, folder, limit, tiny, threads):
    "A process that runs the jobs it is sent"
    torch.set_num_threads(threads)
    bench = Bench(folder, limit, tiny)
    while (sent := inbox.get()) is not None:
        try:
            outbox.put((sent, *bench.run(sent)))
        except Exception:
            outbox.put((sent, None, traceback.format_exc()[-2000:]))
        if bench.device.type == 'cuda':
            torch.cuda.empty_cache()


class Here:
    "Runs jobs in this process, one after the other"

    size = 1

    def __init__(self, folder, limit, tiny):
        self.bench, self.done = Bench(folder, limit, tiny), []

    def send(self, job):
        try:
            self.done.append((job, *self.bench.run(job)))
        except Exception:
            self.done.append((job, None, traceback.format_exc()[-2000:]))

    def receive(self, seconds):
        return self.done.pop(0)

    def close(self):
        pass


class Processes:
    "Runs jobs in several processes that share the device"

    def __init__(self, size, *options):
        self.size, context = size, multiprocessing.get_context('spawn')
        self.inbox, self.outbox = context.Queue(), context.Queue()
        threads = max(1, (os.cpu_count() or 1) // size)
        self.workers = [
            context.Process(
                target=work, args=(self.inbox, self.outbox, *options, threads), daemon=True
            )
            for _ in range(size)
        ]
        for w in self.workers:
            w.start()

    def send(self, job):
        self.inbox.put(job)

    def receive(self, seconds):
        "A finished job, or None after `seconds`"
        end = time.time() + seconds
        while time.time() < end:
            try:
                return self.outbox.get(timeout=min(1, max(0.01, end - time.time())))
            except queue.Empty:
                if not any(w.is_alive() for w in self.workers):
                    raise RuntimeError("all processes ended; see their messages above") from None

    def close(self):
        for w in self.workers:
            w.terminate()


class Plan:
    "Hands out jobs in the plan's order, as long as there is time for them"

    def __init__(self, options, kept, films):
        self.parts, self.tiny, self.kept, self.films = (
            options.parts.split(','),
            options.tiny,
            kept,
            films,
        )
        self.fixed, self.first_seed = (
            dict(c.split('=') for c in options.chosen.split(',') if c),
            options.first_seed,
        )
        self.seconds = options.seconds - (time.time() - kept.started)
        self.started, self.running, self.took = time.time(), [], {}
        self.shares = [float(x) for x in options.shares.split(',')]
        parts, tiny = self.parts, self.tiny
        self.waiting = dict(
            candidates=candidate_jobs(tiny) if 'candidates' in parts else [],
            grid=grid_jobs(tiny) if 'grid' in parts else [],
        )
        self.chosen = None

    def left(self):
        return self.seconds - (time.time() - self.started)

    def kind(self, job):
        return job.part, job.data, job.arch, job.size

    def in_time(self, part):
        "Whether a part may still start jobs"
        share = self.shares[0] + (self.shares[1] if part == 'grid' else 0)
        return time.time() - self.started < share * self.seconds

    def next(self):
        "The job to start now, or None"
        if self.waiting['candidates'] and (
            self.in_time('candidates') or self.waiting['candidates'][0].seed == 0
        ):
            return self.waiting['candidates'].pop(0)
        busy = any(j.part == 'candidates' for j in self.running)
        if not busy and self.chosen is None:
            self.choose()
        if self.waiting['grid'] and self.in_time('grid'):
            return self.waiting['grid'].pop(0)
        if self.chosen is None:
            return None
        for part in ('looks', 'seeds', 'distil'):
            jobs = self.waiting[part]
            if part == 'seeds' and self.left() < self.reserve():
                continue
            if jobs and self.fits(jobs[0]) and (part != 'distil' or self.taught()):
                return jobs.pop(0)
        return None

    def taught(self):
        "Whether all teachers are there"
        return len(self.teachers()) == (2 if self.tiny else 2 * TEACHERS)

    def fits(self, job):
        return self.left() > 1.2 * self.took.get(self.kind(job), 0)

    def reserve(self):
        "Seconds kept for distilling, until that is done"
        if not self.waiting['distil'] or not self.taught():
            return 0
        return 1.3 * self.took.get(
            self.kind(self.waiting['distil'][0]), 3 * max(self.took.values(), default=0)
        )

    def teachers(self):
        "Facts of the three first seeds of the two networks"
        jobs = [
            j
            for j in self.kept.of(part='seeds', data='chest_xray')
            if j['job']['seed'] < TEACHERS and 'resnet50' not in j['job']['arch']
        ]
        return [dict(job=j['job'], slope=j['slope'], intercept=j['intercept']) for j in jobs]

    def judged(self, data):
        "What `choose` needs of the finished candidates of a data set"
        found, films = {}, self.films[data]
        for j in self.kept.of(part='candidates', data=data):
            val = films[films.fold == j['job']['fold']]
            z = {v: self.kept.logits['search'][f"{j['key']}/val/{v}"] for v in VERSIONS}
            found[j['job']['name'], j['job']['fold']] = dict(
                parts=criterion(z, val),
                children=val.patient_id.to_numpy(),
                valid_auc=j['valid_auc'],
                wide_specificity=j['wide_specificity'],
            )
        return found

    def choose(self):
        "Apply the rule to what the candidates gave, and write it down"
        self.chosen, choice = {}, self.kept.facts['choice']
        for data in ('chest_xray', 'pneumoniamnist'):
            found = self.judged(data)
            names = [n for n in candidates(data, self.tiny) if any(n == name for name, _ in found)]
            chosen, table = choose(found, names) if names else (None, [])
            self.chosen[data] = self.fixed.get(data) or chosen or next(iter(candidates(data)))
            choice[data] = dict(
                chosen=self.chosen[data], by_rule=self.chosen[data] == chosen, table=table
            )
        self.kept.write()
        print(json.dumps(choice, default=float), flush=True)
        looks = [
            dataclasses.replace(Job(**j['job']), part='looks')
            for j in self.kept.of(part='candidates')
        ]
        seeds = seed_jobs(self.chosen, self.first_seed, self.tiny) + extra_jobs(
            self.chosen, self.tiny
        )
        later = dict(looks=looks, seeds=seeds, distil=distil_jobs(self.chosen, self.tiny))
        self.waiting |= {part: jobs if part in self.parts else [] for part, jobs in later.items()}


def run(plan, kept, pool, tiny):
    "Keep the pool busy until the plan has nothing left or the time is over"
    sent = {}
    while True:
        while len(plan.running) < pool.size and plan.left() > 0 and (job := plan.next()):
            if job.part == 'distil':
                job = dataclasses.replace(job, teachers=tuple(plan.teachers()))
            small = smaller(job, tiny)
            plan.running.append(small)
            sent[small.key] = time.time(), job
            pool.send(small)
        if not plan.running:
            return
        done = pool.receive(max(0, plan.left()) + 0.1)
        if done is None:
            return
        job, logits, facts = done
        plan.running.remove(job)
        began, asked = sent[job.key]
        plan.took[plan.kind(asked)] = max(plan.took.get(plan.kind(asked), 0), time.time() - began)
        if logits is None:
            kept.fail(job, facts)
        else:
            kept.add(job, logits, facts)
        if len(kept.facts['failed']) > 5 and not kept.facts['jobs']:
            raise RuntimeError(f"the first jobs all failed: {facts}")
        if job.part in ('seeds', 'distil'):
            kept.pack()
        print(
            f"[{time.time() - kept.started:5.0f} s] {job.key} {line_of(logits, facts)}", flush=True
        )


def line_of(logits, facts):
    if logits is None:
        return f"FAILED {facts[-300:]}"
    if 'criterion' not in facts:
        return str(facts['seconds'])
    found = {
        k: round(facts[k], 4)
        for k in ('images_per_second', 'criterion', 'valid_auc', 'wide_specificity')
    }
    return str(
        facts['seconds'] | found | {k: round(v, 1) for k, v in facts.items() if k == 'peak_gib'}
    )


def prepare(kept, folder, limit, tiny, parts):
    "Decode every film once, for all processes; returns the tables by data set"
    tables, bench = {}, Bench(folder, limit, tiny)
    for data in ('chest_xray', 'pneumoniamnist'):
        films = bench.films(data)
        tables[data] = films.table()
        jobs = [
            smaller(j, tiny)
            for j in candidate_jobs() + (grid_jobs() if 'grid' in parts else [])
            if j.data == data
        ]
        for size, geometry in sorted(
            {(films.native, 'squash')} | {(j.size, j.geometry) for j in jobs}
        ):
            films.images(size, geometry)
        kept.facts['films'][data] = tables[data].drop(columns='row').to_dict('list')
    nih = sample_patients(load_dataset('nih_chestxray14'), limit).table
    kept.facts['films']['nih_chestxray14'] = nih[
        ['image_id', 'patient_id', 'label', 'view']
    ].to_dict('list')
    kept.write()
    print(f"[{time.time() - kept.started:5.0f} s] films decoded", flush=True)
    return tables


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--seconds', type=float, default=400)
    parser.add_argument(
        '--processes',
        type=int,
        default=3 if torch.cuda.is_available() else 0,
        help="0: in this process, one after the other",
    )
    parser.add_argument('--limit', type=int, default=0, help="about so many films of each data set")
    parser.add_argument('--tiny', action='store_true', help="tiny networks, one seed, two recipes")
    parser.add_argument(
        '--shares', default='0.3,0.15', help="of the seconds for candidates and grid, at most"
    )
    parser.add_argument('--parts', default='candidates,grid,looks,seeds,distil')
    parser.add_argument(
        '--chosen',
        default='',
        help="recipes of an earlier call, such as chest_xray=wide,pneumoniamnist=wide",
    )
    parser.add_argument(
        '--first-seed', type=int, default=0, help="of the networks; distilling needs 0"
    )
    parser.add_argument(
        '--work', type=Path, help="folder for decoded films and weights; default: a temporary one"
    )
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work or Path(temporary)
        os.environ['CXR_CACHE'] = str(folder / 'cache')
        kept = Kept(options.out, folder, {k: str(v) for k, v in vars(options).items()})
        shared = folder, options.limit, options.tiny
        pool = Processes(options.processes, *shared) if options.processes else Here(*shared)
        try:
            tables = prepare(kept, *shared, options.parts.split(','))
            run(Plan(options, kept, tables), kept, pool, options.tiny)
        finally:
            pool.close()
        kept.facts['seconds'] = round(time.time() - kept.started, 1)
        kept.write()
    print(
        f"{len(kept.facts['jobs'])} jobs, {len(kept.facts['failed'])} failed, {kept.facts['seconds']} s",
        flush=True,
    )


if __name__ == '__main__':
    main()
