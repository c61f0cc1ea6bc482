"""Trains the networks of ANALYSIS_PLAN.md on one GPU (or a CPU) within a number of seconds, the most telling first.

  candidates  the plan's recipes, on validation alone; the plan's rule chooses one for each data set and writes it down
  grid        squash, true crop and letterbox x equalise and stretch at 64 px
  looks       the candidates on their test, after the choice
  seeds       one seed of each network in turn, until the time is used up
  distil      one ResNet-18 taught by three seeds each of two networks

Whatever is finished lies whole in --out: seeds.npz and search.npz (logits), second_edition.json (films, choice, histories, times),
weights-*.safetensors (half precision). A run that is killed leaves what was finished. Several processes share the GPU, because small steps leave it idle.

usage: second_edition.py --out FOLDER [--seconds 400] [--processes 3] [--limit 0] [--tiny] [--parts candidates,grid,looks,seeds,distil]
CXR_DATA has to hold chest_xray, chest_xray_matches.csv, pneumoniamnist, nih_chestxray14 and weights.
"""
import argparse, dataclasses, json, math, multiprocessing, os, queue, sys, tempfile, time, traceback, warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

warnings.filterwarnings('ignore')
import numpy as np, pandas as pd, torch
from fastai.vision.all import Callback, default_device
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from cxr_study import batches as loaders, learner as recipes
from cxr_study.batches import reshape, stress_tables, STRESS
from cxr_study.core import atomic_write, git_state, hardware, sha256, to_json, versions
from cxr_study.data import decoded, kermany_names, load_dataset, make_split, sample_patients, take
from cxr_study.images import Preprocess
from cxr_study.learner import Recipe, fit
from cxr_study.networks import Classifier, create_body
from cxr_study.training import Training, learner, predict_logits, train

WIDE = 1.35                                 # Width over height from which a film is called wide
SHAPES = (.67, .8, .9, 1., 1.11, 1.25, 1.5)
VERSIONS = (*STRESS, 'narrower', 'wider')   # The seven versions of a validation film
SENSITIVITY = .97                           # At which wide normals are read
SPARE = .01                                 # Differences of that specificity that count as none
REPEATS = 3                                 # Copies of the training films in a table that is drawn or overlaid
ROUNDS = 20                                 # Seeds of each network, at most
SHARE = dict(candidates=.3, grid=.15)       # Of the seconds, at most
FILE_BYTES, ALL_BYTES = 15 * 2**20, 56 * 2**20  # Of a file of weights; of all of them


@dataclasses.dataclass(frozen=True)
class Job:
    "One training, or (part `looks`) the test of one that is finished"
    part: str                               # candidates, grid, looks, seeds or distil
    data: str                               # chest_xray or pneumoniamnist
    name: str                               # Of the recipe
    seed: int = 0
    fold: int = 0
    arch: str = 'resnet18'
    weights: str = 'none'
    size: int = 224
    epochs: int = 12
    lr: float = 0.
    augment: str = 'stretch'
    geometry: str = 'squash'                # squash, crop or letterbox
    balanced: bool = False                  # Label and shape drawn independently
    overlay: bool = False                   # Markers on a third of the films of both classes
    ema: float = 0.

    @property
    def key(self): return f"{self.part}-{self.data}-{self.arch}-{self.name}-seed{self.seed}"


# Recipes and networks of the plan

def candidates(data, tiny=False):
    "Name -> choices, simple to complex"
    if data == 'pneumoniamnist':
        found = dict(equalise=dict(size=64, augment='equalise'), stretch=dict(size=64), wide=dict(size=64, augment='stretch_wide'),
                     wide_128=dict(size=128, augment='stretch_wide'))
    else:
        wide = dict(size=128, augment='stretch_wide')
        changes = dict(crop=dict(geometry='crop'), balanced=dict(balanced=True), overlay=dict(overlay=True), average=dict(ema=.98))
        found = dict(stretch=dict(size=128), wide=wide) | {f'wide_{name}': wide | change for name, change in changes.items()}
        found['wide_all'] = wide | changes['balanced'] | changes['overlay'] | changes['average']
    return dict(list(found.items())[:2]) if tiny else found


def candidate_jobs(tiny=False):
    return [Job('candidates', data, name, seed, seed, **choices) for seed in range(1 if tiny else 3) for data in ('chest_xray', 'pneumoniamnist')
            for name, choices in candidates(data, tiny).items()]


def grid_jobs(tiny=False):
    cells = [(g, a) for g in ('squash', 'crop', 'letterbox') for a in ('equalise', 'stretch')][:2 if tiny else 6]
    return [Job('grid', 'chest_xray', f'{g}_{a}', seed, geometry=g, augment=a, size=64, epochs=6) for seed in range(1 if tiny else 5) for g, a in cells]


def seed_jobs(chosen, tiny=False):
    "One seed of each network in turn; `chosen`: data set -> name of the recipe"
    found = []
    for seed in range(1 if tiny else ROUNDS):
        for data in ('chest_xray', 'pneumoniamnist'):
            choices = candidates(data)[chosen[data]]
            if data == 'chest_xray': choices = choices | dict(size=224)
            for arch in ('resnet18', 'tf_efficientnetv2_b0'): found.append(network_job(arch, data, chosen[data], seed, choices))
    return found


def extra_jobs(chosen, tiny=False):
    "ResNet-50, if the seeds are through"
    choices = candidates('chest_xray')[chosen['chest_xray']] | dict(size=224)
    return [Job('seeds', 'chest_xray', chosen['chest_xray'], seed, arch='resnet50', **choices) for seed in range(0 if tiny else ROUNDS)]


def network_job(arch, data, name, seed, choices):
    pretrained = dict(weights='imagenet', epochs=6, lr=.003) if arch == 'tf_efficientnetv2_b0' else {}
    return Job('seeds', data, name, seed, arch=arch, **choices | pretrained)


def distil_jobs(chosen, tiny=False):
    choices = candidates('chest_xray')[chosen['chest_xray']] | dict(size=224)
    return [Job('distil', 'chest_xray', chosen['chest_xray'], seed, **choices) for seed in range(1 if tiny else 5)]


def smaller(job, tiny):
    "The job at a size that a CPU trains in a second"
    if not tiny: return job
    arch = dict(resnet18='test_resnet', tf_efficientnetv2_b0='test_efficientnet').get(job.arch, job.arch)
    return dataclasses.replace(job, arch=arch, weights='none', size=32, epochs=min(job.epochs, 3))


def register():
    "The plan's wider stretching, as an augmentation of the library"
    if 'stretch_wide' in loaders.AUGMENTATIONS: return
    def wide(): return [*loaders.affine(loaders.stretched(.7)), *loaders.lighting(.3), loaders.Drawn(loaders.equalise, 1., .3)]
    loaders.AUGMENTATIONS['stretch_wide'] = wide
    recipes.CHOICES['augment'] = tuple(loaders.AUGMENTATIONS)


# Films

def matches():
    "Table of chest_xray's files with their ratio and the PneumoniaMNIST image of the same film"
    return pd.read_csv(Path(os.environ['CXR_DATA'])/'chest_xray_matches.csv', keep_default_na=False, dtype=dict(mnist_index=str))


def chest_films(limit=0):
    image_set = sample_patients(load_dataset('chest_xray'), limit)
    ratio = matches().set_index('file').width_over_height
    return image_set, image_set.table.image_id.map(ratio).to_numpy(float)


def mnist_films(limit=0):
    "PneumoniaMNIST with the children of the match; copies in train and val, and films there without a match, are left out"
    image_set, found = load_dataset('pneumoniamnist'), matches()
    found = found[found.mnist_split != ''].assign(image_id=lambda m: [f"{s}-{int(i):04d}" for s, i in zip(m.mnist_split, m.mnist_index)])
    found = found.drop_duplicates('image_id').reset_index(drop=True)
    official = [f.split('/')[0] for f in found.file]
    found['child'] = kermany_names([Path(f).name for f in found.file], official).patient_id.to_numpy()
    table = image_set.table.merge(found[['image_id', 'child', 'width_over_height']], 'left', 'image_id')
    table['patient_id'] = table.child.fillna(table.image_id)
    test = (table.official == 'test').to_numpy()
    copied = pd.Series([sha256(np.ascontiguousarray(image_set.source(i)).data) for i in range(len(table))])
    order = table.child.isna().sort_values(kind='stable').index           # Of copies, one with a child is kept
    copied = copied[order].duplicated().sort_index().to_numpy()
    kept = np.flatnonzero(test | ~(table.child.isna().to_numpy() | copied))
    named = dataclasses.replace(image_set, table=table.drop(columns=['child', 'width_over_height']), patients_known=True)
    named = take(named, kept)
    ratio = table.width_over_height.to_numpy(float)[kept]
    if limit:
        few = sample_patients(dataclasses.replace(named, table=named.table.assign(ratio=ratio)), limit)
        named, ratio = dataclasses.replace(few, table=few.table.drop(columns='ratio')), few.table.ratio.to_numpy()
    return named, ratio


def fitted(image, ratio, size, geometry):   # uint8 [224, 224] squashed film; its width over height
    "uint8 [size, size]: the true central square, or the whole film in black bars"
    h, w = image.shape
    picture = Image.fromarray(image)
    across, down = min(1, 1/ratio), min(1, ratio)
    if geometry == 'crop':
        box = (w*(1 - across)/2, h*(1 - down)/2, w*(1 + across)/2, h*(1 + down)/2)
        return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR, box=box))
    inner = (max(1, round(size*down)), max(1, round(size*across)))
    whole = Image.new('L', (size, size))
    whole.paste(picture.resize(inner, Image.Resampling.BILINEAR), ((size - inner[0])//2, (size - inner[1])//2))
    return np.asarray(whole)


def marked(image, rng):                     # uint8 [H, W]; NumPy generator
    "The film with a letter, a time stamp or a line of the exposure at a random place of its upper or lower part"
    h, w = image.shape
    words = [rng.choice(['R', 'L']), f"{rng.integers(24):02d}:{rng.integers(60):02d}", f"KV{rng.integers(50, 75)}"]
    words = str(words[rng.integers(3)])
    font = ImageFont.load_default(size=int(h*(rng.uniform(.08, .16) if len(words) == 1 else rng.uniform(.04, .08))))
    x, y = rng.uniform(0, .8)*w, (rng.uniform(0, .15) if rng.random() < .5 else rng.uniform(.75, .9))*h
    picture = Image.fromarray(image)
    ImageDraw.Draw(picture).text((x, y), words, fill=int(rng.integers(180, 256)), font=font)
    return np.asarray(picture)


class Films:
    "A data set's table, and its images in the sizes and geometries asked for, kept on disk for all processes"
    def __init__(self, folder, data, limit=0, tiny=False):
        self.folder, self.data, self.tiny = Path(folder), data, tiny
        self.image_set, self.ratio = (chest_films if data == 'chest_xray' else mnist_films)(limit)
        self.native = 32 if tiny else 224

    @cache
    def squashed(self, size):
        images, index, _ = decoded(self.image_set, Preprocess(size=size), self.folder/'cache')
        return images, index

    @cache
    def table(self, folds=3):
        "image_id, patient_id, label, official, ratio and the fold that a film validates (-1: another; -2: test)"
        index = self.squashed(self.native)[1]
        split = [make_split(self.image_set, index.sha256, 'grouped', 5, k, 0)[0].split.to_numpy() for k in range(folds)]
        table = self.image_set.table[['image_id', 'patient_id', 'label', 'official']].assign(ratio=self.ratio, row=range(len(self.ratio)))
        fold = np.full(len(table), -1)
        for k, found in enumerate(split): fold[found == 'val'] = k
        fold[split[0] == 'test'] = -2
        return table.assign(fold=fold, wide=self.ratio >= WIDE)

    @cache
    def images(self, size, geometry='squash'):
        "uint8 [N, size, size], a read-only memory map"
        if geometry == 'squash' or self.data != 'chest_xray': return self.squashed(size)[0]
        path = self.folder/f'{self.data}-{geometry}-{size}.npy'
        if not path.exists():
            whole = self.squashed(self.native)[0]
            with ThreadPoolExecutor() as pool:
                made = list(pool.map(lambda i: fitted(whole[i], self.ratio[i], size, geometry), range(len(whole))))
            with atomic_write(path) as f: np.save(f.open('wb'), np.stack(made))
        return np.load(path, mmap_mode='r')


def seven(images):                          # uint8 [n, H, W]
    "Version -> uint8 [n, H, W]"
    found = {name: table[images] for name, table in zip(STRESS, stress_tables())}
    return found | dict(narrower=shaped(images, .8), wider=shaped(images, 1.25))


def shaped(images, factor):
    "The films made wider by `factor`, or narrower if it is below one"
    return images if factor == 1 else reshape(images, max(1, 1/factor), max(1, factor))


def independent(table, copies, seed):       # Training rows with `label` and `wide`; how many copies of the table
    "Positions into `table`, about `copies` times as many, drawn so that label and wide are independent and their totals stay"
    rng, n = np.random.default_rng(seed), len(table)
    groups = table.groupby(['label', 'wide']).indices
    label, wide = table.label.value_counts(normalize=True), table.wide.value_counts(normalize=True)
    found = []
    for (y, w), rows in groups.items():
        rows = rng.permutation(rows)
        expected = copies*n*label[y]*wide[w]/len(rows)
        times = np.diff(np.floor(np.arange(len(rows) + 1)*expected + rng.random())).astype(int)
        found.append(np.repeat(rows, times))
    return np.concatenate(found)


def training_pixels(films, job):
    "(uint8 images [training films, the same with markers if the job wants them, validation films], versions of the validation films)"
    images, table = films.images(job.size, job.geometry), films.table()
    plain = images[training_rows(table, job).row.to_numpy()]
    rng = np.random.default_rng(0)
    marks = [np.stack([marked(x, rng) for x in plain])] if job.overlay else []
    versions_ = seven(images[table.row[table.fold == job.fold].to_numpy()])
    mixed = np.stack([versions_[VERSIONS[i % len(VERSIONS)]][i] for i in range(len(versions_['plain']))])
    return np.concatenate([plain, *marks, mixed]), versions_


def training_rows(table, job): return table[(table.fold != job.fold) & (table.fold != -2)]


def training_table(films, job, images):     # Number of images in `training_pixels`
    "(table with `row` and `split`, a row a film to be seen in an epoch; epochs)"
    table = films.table()
    val, train_rows = table[table.fold == job.fold], training_rows(table, job)
    at, epochs = np.arange(len(train_rows)), job.epochs
    if job.balanced or job.overlay:
        at = independent(train_rows, REPEATS, job.seed) if job.balanced else np.tile(at, REPEATS)
        epochs = max(1, round(job.epochs/REPEATS))
    rows = at.copy()
    if job.overlay:                         # A third of each class
        order = np.argsort(train_rows.label.to_numpy()[at] + np.random.default_rng(job.seed).random(len(at)))
        rows[order[::3]] += len(train_rows)
    seen = train_rows.iloc[at].assign(row=rows, split='train')
    return pd.concat([seen, val.assign(row=images - len(val) + np.arange(len(val)), split='val')], ignore_index=True), epochs


# One job

class Teacher(Callback):
    "Give a training batch the teacher's mean probability as its labels, on the same augmented films"
    order = 65
    def __init__(self, members, lines): self.members, self.lines = members, lines
    def before_batch(self):
        if not self.training: return
        x = torch.Tensor(self.xb[0])
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == 'cuda'):
            logits = [slope*m(x)[:, 0].float() + intercept for m, (slope, intercept) in zip(self.members, self.lines)]
        self.learn.yb = (torch.stack(logits).mean(0).sigmoid(),)


def network_of(job, path, device):
    "The trained network of a finished job, in evaluation mode"
    model = Classifier(create_body(job.arch), Preprocess(size=job.size, standardise='image'))
    model.load_state_dict(torch.load(path, map_location='cpu', weights_only=True))
    return model.to(device, memory_format=torch.channels_last).eval()


class Bench:
    "Films and device of one process"
    def __init__(self, folder, limit, tiny):
        self.folder, self.limit, self.tiny, self.device, self.kept = Path(folder), limit, tiny, default_device(), {}
        register()

    def films(self, data):
        if data not in self.kept: self.kept[data] = Films(self.folder, data, self.limit, self.tiny)
        return self.kept[data]

    def tests(self, job):
        "Name -> uint8 [n, H, W]: the test in the plan's shapes, or as it is"
        films = self.films(job.data)
        images, table = films.images(job.size, job.geometry), films.table()
        plain = images[table.row[table.fold == -2].to_numpy()]
        shapes = SHAPES if job.part in ('seeds', 'distil') else (1.,)
        return {f'test/{f:g}': shaped(plain, f) for f in shapes}

    def elsewhere(self, size):
        if 'nih' not in self.kept: self.kept['nih'] = sample_patients(load_dataset('nih_chestxray14'), self.limit)
        return decoded(self.kept['nih'], Preprocess(size=size), self.folder/'cache')[0]

    def remembered(self, key, make):
        "What `make()` gives, kept for the next job of the same kind"
        if key not in self.kept: self.kept[key] = make()
        return self.kept[key]

    def logits(self, model, images):        # Name -> uint8 [n, H, W]
        bs = 64 if self.device.type == 'cpu' else 512
        return {name: predict_logits(model, x, np.arange(len(x)), bs, self.device).astype(np.float32) for name, x in images.items()}

    def run(self, job, facts):
        "(logits by name, facts) of a job; `facts` names the members of a teacher"
        started = time.time()
        if self.device.type == 'cuda': torch.cuda.reset_peak_memory_stats()
        path = self.folder/'weights'/f'{job.key}.pt'
        tests = self.remembered(('tests', job.data, job.size, job.geometry, job.part in ('seeds', 'distil')), lambda: self.tests(job))
        if job.part == 'looks':
            path = self.folder/'weights'/f"{job.key.replace('looks', 'candidates', 1)}.pt"
            return self.logits(network_of(job, path, self.device), tests), dict(seconds=round(time.time() - started, 2))
        films, kind = self.films(job.data), ('training', job.data, job.size, job.geometry, job.fold, job.overlay)
        pixels, seven_ = self.remembered(kind, lambda: training_pixels(films, job))
        table, epochs = training_table(films, job, len(pixels))
        val = table[table.split == 'val']
        prepared = time.time()
        recipe = Recipe(epochs=epochs, lr=job.lr, augment=job.augment, ema=job.ema)
        training, spec = Training(job.arch, job.weights, recipe, job.seed), Preprocess(size=job.size, standardise='image')
        checkpoint = self.folder/f'checkpoint-{os.getpid()}.pt'
        checkpoint.unlink(missing_ok=True)
        if job.part == 'distil':
            learn = learner(training, pixels, table, spec, self.device)
            members = [network_of(Job(**m['job']), self.folder/'weights'/f"{Job(**m['job']).key}.pt", self.device) for m in facts]
            learn.add_cb(Teacher(members, [(m['slope'], m['intercept']) for m in facts]))
            history, model = fit(learn, recipe, checkpoint, job.seed, False, job.key, str), learn.model.eval()
        else: model, history = train(training, pixels, table, spec, checkpoint, str, self.device)
        trained = time.time()
        path.parent.mkdir(exist_ok=True)
        torch.save({k: v.detach().cpu().clone() for k, v in model.state_dict().items()}, path)
        found = self.logits(model, {f'val/{k}': x for k, x in seven_.items()})
        if job.part in ('seeds', 'distil'): tests = tests | {'nih': self.remembered(('nih', job.size), lambda: np.array(self.elsewhere(job.size)))}
        if job.part != 'candidates': found |= self.logits(model, tests)
        peak = torch.cuda.max_memory_allocated()/2**30 if self.device.type == 'cuda' else None
        seconds = dict(prepare=prepared - started, train=trained - prepared, predict=time.time() - trained)
        z, y = {k[4:]: v for k, v in found.items() if k.startswith('val/')}, val.label.to_numpy()
        line = platt_line(z, val)
        return found, dict(seconds={k: round(v, 2) for k, v in seconds.items()}, peak_gib=peak, history=history.to_dict('list'), films=len(table), epochs=epochs,
                           images_per_second=float(history.images_per_second.median()), criterion=criterion(z, val).mean(), slope=line[0],
                           intercept=line[1], valid_auc=float(roc_auc_score(y, z['plain'])), wide_specificity=wide_specificity(z['plain'], val))


# The rule of the plan

def group_weights(table):                   # `label` and `wide`
    "Weights with mean 1 that give each of the four groups the same total; absent groups are passed over"
    size = table.groupby(['label', 'wide']).label.transform('size').to_numpy(float)
    return len(table)/(size*len(table.groupby(['label', 'wide'])))


def platt_line(z, table, weights=None):     # Version -> logits [n]
    "(slope, intercept) fitted on all versions"
    x, y = np.concatenate(list(z.values())), np.tile(table.label, len(z))
    weights = None if weights is None else np.tile(weights, len(z))
    found = LogisticRegression(C=1e6, max_iter=1000).fit(x[:, None].astype(float), y, weights)
    return float(found.coef_[0, 0]), float(found.intercept_[0])


def criterion(z, table):                    # Version -> logits [n]; the validation films
    "Each film's part [n] of criterion C: its mean is C"
    weights = group_weights(table)
    slope, intercept = platt_line(z, table, weights)
    sign = np.where(table.label == 1, -1, 1)
    loss = np.mean([np.logaddexp(0, sign*(slope*v.astype(float) + intercept)) for v in z.values()], 0)
    return weights*loss


def wide_specificity(logit, table):         # Plain logits [n]
    "Share of wide normals below the threshold that gives the plan's sensitivity"
    sick, wide = logit[table.label.to_numpy() == 1], logit[((table.label == 0) & table.wide).to_numpy()]
    threshold = np.sort(sick)[math.floor((1 - SENSITIVITY)*len(sick))]
    return float((wide < threshold).mean()) if len(wide) else math.nan


def standard_error(parts, children):        # Differences [n] a training, and the child of each film
    "The larger of the standard errors over trainings and over children"
    means = np.array([p.mean() for p in parts])
    over_trainings = means.std(ddof=1)/len(means)**.5 if len(means) > 1 else 0.
    n = sum(map(len, parts))
    sums = [pd.Series(p - p.mean()).groupby(np.asarray(c)).sum().to_numpy() for p, c in zip(parts, children)]
    return max(float(over_trainings), float(np.sqrt((np.concatenate(sums)**2).sum())/n))


def choose(found, names):                   # (name, fold) -> dict(parts [n], children [n], wide_specificity, valid_auc); names, simple to complex
    "(name of the recipe, a row a candidate) by the plan's rule"
    folds = sorted({f for _, f in found if all((n, f) in found for n in names)})
    if not folds: return names[0], []
    mean = {n: float(np.mean([found[n, f]['parts'].mean() for f in folds])) for n in names}
    best, rows = min(names, key=mean.get), []
    for n in names:
        parts = [found[n, f]['parts'] - found[best, f]['parts'] for f in folds]
        rows.append(dict(candidate=n, folds=folds, criterion=mean[n], excess=mean[n] - mean[best], error=standard_error(parts, [found[n, f]['children'] for f in folds]),
                         wide_specificity=float(np.mean([found[n, f]['wide_specificity'] for f in folds])),
                         valid_auc=float(np.mean([found[n, f]['valid_auc'] for f in folds]))))
    ties = [r for r in rows if r['excess'] <= r['error']]
    top = max(r['wide_specificity'] for r in ties)
    chosen = next(r['candidate'] for r in ties if r['wide_specificity'] >= top - SPARE)
    return chosen, [r | dict(tie=r in ties, chosen=r['candidate'] == chosen) for r in rows]


# What is written

class Kept:
    "Everything that is finished, written whole after each job"
    def __init__(self, out, folder, options):
        self.out, self.folder, self.started = Path(out), Path(folder), time.time()
        self.logits, self.packed = dict(seeds={}, search={}), None
        self.facts = dict(schema=1, options=options, versions=versions(), git=git_state(), hardware=hardware(), jobs=[], failed=[], choice={}, films={})
        if torch.cuda.is_available(): self.facts['gpu'] = gpu_facts()

    def add(self, job, logits, facts):
        place = 'search' if job.part in ('candidates', 'grid', 'looks') else 'seeds'
        for name, z in logits.items(): self.logits[place][f'{job.key}/{name}'] = z
        self.facts['jobs'].append(dict(job=dataclasses.asdict(job), key=job.key, finished=round(time.time() - self.started, 1), **facts))
        self.write(place)

    def fail(self, job, error):
        self.facts['failed'].append(dict(job=dataclasses.asdict(job), error=error))
        self.write()

    def write(self, place=None):
        "The JSON, and the logits of `place`, if it is named"
        if place:
            with atomic_write(self.out/f'{place}.npz') as f:
                with open(f, 'wb') as stream: np.savez(stream, **self.logits[place])
        with atomic_write(self.out/'second_edition.json') as f: f.write_text(to_json(finite(self.facts)))

    def of(self, **wanted):
        "The finished jobs whose fields are these"
        return [j for j in self.facts['jobs'] if all(j['job'][k] == v for k, v in wanted.items())]

    def shipped(self):
        "Keys of the weights to keep, most wanted first: the best distilled network (or the first ResNet-18), then a seed of each network"
        distilled = sorted(self.of(part='distil'), key=lambda j: j['criterion'])
        order = distilled[:1] or self.of(part='seeds', seed=0, data='chest_xray')[:1]
        order += sorted(self.of(part='seeds', seed=0), key=lambda j: ('efficientnet' not in j['job']['arch'], j['job']['data']))
        return list(dict.fromkeys(j['key'] for j in order))

    def pack(self):
        "Half-precision weights of `shipped`, in files of at most `FILE_BYTES`, as many networks as `ALL_BYTES` hold"
        files, size, total, names = [{}], 0, 0, []
        for key in self.shipped():
            state = {f'{key}/{k}': half(v) for k, v in torch.load(self.folder/'weights'/f'{key}.pt', weights_only=True).items()}
            whole = sum(map(nbytes, state.values()))
            if total + whole > ALL_BYTES: continue
            total, names = total + whole, names + [key]
            for k, v in state.items():
                if size + nbytes(v) > FILE_BYTES: files, size = files + [{}], 0
                files[-1][k], size = v, size + nbytes(v)
        if names == self.packed or len(files) > 5: return
        for i, tensors in enumerate(files):
            with atomic_write(self.out/f'weights-{i}.safetensors') as f: save_file(tensors, f)
        for i in range(len(files), 5): (self.out/f'weights-{i}.safetensors').unlink(missing_ok=True)
        self.packed = names


def nbytes(v): return v.numel()*v.element_size()
def half(v): return v.half().contiguous() if v.is_floating_point() and v.numel() > 2**14 else v.contiguous()


def finite(x):
    "`x` with None for numbers that are not finite"
    if isinstance(x, dict): return {k: finite(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)): return [finite(v) for v in x]
    return None if isinstance(x, (float, np.floating)) and not math.isfinite(x) else x


def gpu_facts():
    return dict(name=torch.cuda.get_device_name(), cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), bf16=torch.cuda.is_bf16_supported(),
                tf32_convolution=torch.backends.cudnn.allow_tf32, tf32_matmul=torch.backends.cuda.matmul.allow_tf32)


# Many jobs

def work(inbox, outbox, folder, limit, tiny, threads):
    "A process that runs the jobs it is sent"
    torch.set_num_threads(threads)
    bench = Bench(folder, limit, tiny)
    outbox.put((None, None, None, None))    # Ready
    while (sent := inbox.get()) is not None:
        job, facts = sent
        try: outbox.put((os.getpid(), job, *bench.run(job, facts)))
        except Exception: outbox.put((os.getpid(), job, None, traceback.format_exc()[-2000:]))
        if bench.device.type == 'cuda': torch.cuda.empty_cache()


class Here:
    "Runs jobs in this process, one after the other"
    size = 1
    def __init__(self, folder, limit, tiny): self.bench, self.done = Bench(folder, limit, tiny), []
    def send(self, job, facts):
        try: self.done.append((job, *self.bench.run(job, facts)))
        except Exception: self.done.append((job, None, traceback.format_exc()[-2000:]))
    def receive(self, seconds): return self.done.pop(0)
    def close(self): pass


class Processes:
    "Runs jobs in several processes that share the device"
    def __init__(self, size, *options):
        self.size, context = size, multiprocessing.get_context('spawn')
        self.inbox, self.outbox = context.Queue(), context.Queue()
        threads = max(1, (os.cpu_count() or 1)//size)
        self.workers = [context.Process(target=work, args=(self.inbox, self.outbox, *options, threads), daemon=True) for _ in range(size)]
        for w in self.workers: w.start()
    def send(self, job, facts): self.inbox.put((job, facts))
    def receive(self, seconds):
        "A finished job, or None after `seconds`"
        end = time.time() + seconds
        while time.time() < end:
            try: _, job, *rest = self.outbox.get(timeout=min(1, max(.01, end - time.time())))
            except queue.Empty:
                if not any(w.is_alive() for w in self.workers): raise RuntimeError("all processes ended; see their messages above") from None
                continue
            if job is not None: return job, *rest
    def close(self):
        for w in self.workers: w.terminate()


class Plan:
    "Hands out jobs in the plan's order, as long as there is time for them"
    def __init__(self, parts, seconds, kept, films, tiny):
        self.parts, self.seconds, self.kept, self.films, self.tiny = parts, seconds, kept, films, tiny
        self.started, self.running, self.took = time.time(), [], {}
        self.waiting = dict(candidates=candidate_jobs(tiny) if 'candidates' in parts else [], grid=grid_jobs(tiny) if 'grid' in parts else [])
        self.chosen = None

    def left(self): return self.seconds - (time.time() - self.started)
    def kind(self, job): return job.part, job.data, job.arch, job.size

    def in_time(self, part):
        "Whether a part may still start jobs"
        share = SHARE['candidates'] + (SHARE['grid'] if part == 'grid' else 0)
        return time.time() - self.started < share*self.seconds

    def next(self):
        "The job to start now, or None"
        if self.waiting['candidates'] and (self.in_time('candidates') or self.waiting['candidates'][0].seed == 0):
            return self.waiting['candidates'].pop(0)
        busy = any(j.part == 'candidates' for j in self.running)
        if not busy and self.chosen is None: self.choose()
        if self.waiting['grid'] and self.in_time('grid'): return self.waiting['grid'].pop(0)
        if self.chosen is None: return None
        for part in ('looks', 'seeds', 'distil'):
            jobs = self.waiting[part]
            if part == 'seeds' and self.left() < self.reserve(): continue
            if jobs and (part != 'distil' or len(self.teachers()) == 6 or self.tiny and self.teachers()) and self.fits(jobs[0]): return jobs.pop(0)
        return None

    def fits(self, job): return self.left() > 1.2*self.took.get(self.kind(job), 0)

    def reserve(self):
        "Seconds kept for distilling, until that is done"
        if not self.waiting['distil'] or len(self.teachers()) < 6: return 0
        return 1.3*self.took.get(self.kind(self.waiting['distil'][0]), 3*max(self.took.values(), default=0))

    def teachers(self):
        "Facts of the three first seeds of the two networks"
        jobs = [j for j in self.kept.of(part='seeds', data='chest_xray') if j['job']['seed'] < 3 and 'resnet50' not in j['job']['arch']]
        return [dict(job=j['job'], slope=j['slope'], intercept=j['intercept']) for j in jobs]

    def choose(self):
        "Apply the rule to what the candidates gave, and write it down"
        self.chosen = {}
        for data in ('chest_xray', 'pneumoniamnist'):
            names, found = list(candidates(data, self.tiny)), {}
            for j in self.kept.of(part='candidates', data=data):
                val = self.films[data][self.films[data].fold == j['job']['fold']]
                z = {v: self.kept.logits['search'][f"{j['key']}/val/{v}"] for v in VERSIONS}
                found[j['job']['name'], j['job']['fold']] = dict(parts=criterion(z, val), children=val.patient_id.to_numpy(), valid_auc=j['valid_auc'],
                                                                wide_specificity=j['wide_specificity'])
            names = [n for n in names if any(n == name for name, _ in found)] or names[:1]
            self.chosen[data], table = choose(found, names)
            self.kept.facts['choice'][data] = dict(chosen=self.chosen[data], by_rule=bool(table), table=table)
        self.kept.write()
        print(json.dumps({k: v['chosen'] for k, v in self.kept.facts['choice'].items()}), flush=True)
        looks = [dataclasses.replace(Job(**j['job']), part='looks') for j in self.kept.of(part='candidates')]
        tiny, parts = self.tiny, self.parts
        self.waiting |= dict(looks=looks if 'looks' in parts else [], distil=distil_jobs(self.chosen, tiny) if 'distil' in parts else [],
                             seeds=seed_jobs(self.chosen, tiny) + extra_jobs(self.chosen, tiny) if 'seeds' in parts else [])


def run(plan, kept, pool, tiny):
    "Keep the pool busy until the plan has nothing left or the time is over"
    sent = {}
    while True:
        while len(plan.running) < pool.size and plan.left() > 0 and (job := plan.next()):
            small = smaller(job, tiny)
            plan.running.append(small)
            sent[small.key] = time.time(), job
            pool.send(small, plan.teachers() if job.part == 'distil' else None)
        if not plan.running: return
        done = pool.receive(max(0, plan.left()) + .1)
        if done is None: return
        job, logits, facts = done
        plan.running.remove(job)
        began, asked = sent[job.key]
        plan.took[plan.kind(asked)] = max(plan.took.get(plan.kind(asked), 0), time.time() - began)
        if logits is None: kept.fail(job, facts)
        else: kept.add(job, logits, facts)
        if len(kept.facts['failed']) > 5 and not kept.facts['jobs']: raise RuntimeError(f"the first jobs all failed: {facts}")
        if job.part in ('seeds', 'distil'): kept.pack()
        print(f"[{time.time() - kept.started:5.0f} s] {job.key} {line_of(logits, facts)}", flush=True)


def line_of(logits, facts):
    if logits is None: return f"FAILED {facts[-300:]}"
    if 'criterion' not in facts: return str(facts['seconds'])
    return (f"{facts['seconds']} {facts['images_per_second']:.0f} images/s C {facts['criterion']:.4f} val AUC {facts['valid_auc']:.4f} "
            f"wide {facts['wide_specificity']:.3f}")


def prepare(kept, folder, limit, tiny, parts):
    "Decode every film once, for all processes; returns the tables by data set"
    tables = {}
    bench = Bench(folder, limit, tiny)
    for data in ('chest_xray', 'pneumoniamnist'):
        films = bench.films(data)
        tables[data] = films.table()
        jobs = [smaller(j, tiny) for j in candidate_jobs() + (grid_jobs() if 'grid' in parts else []) if j.data == data]
        for size, geometry in sorted({(j.size, j.geometry) for j in jobs} | ({(224, 'squash'), (224, 'crop')} if data == 'chest_xray' and not tiny else set())):
            films.images(size, geometry)
        kept.facts['films'][data] = tables[data].drop(columns='row').to_dict('list')
    nih = sample_patients(load_dataset('nih_chestxray14'), limit).table
    kept.facts['films']['nih_chestxray14'] = nih[['image_id', 'patient_id', 'label', 'view']].to_dict('list')
    for size in {32} if tiny else {64, 128, 224}: bench.elsewhere(size)
    kept.write()
    print(f"[{time.time() - kept.started:5.0f} s] films decoded", flush=True)
    return tables


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--seconds', type=float, default=400)
    parser.add_argument('--processes', type=int, default=3 if torch.cuda.is_available() else 0, help="0: in this process, one after the other")
    parser.add_argument('--limit', type=int, default=0, help="about so many films of each data set")
    parser.add_argument('--tiny', action='store_true', help="tiny networks, one seed, two recipes")
    parser.add_argument('--parts', default='candidates,grid,looks,seeds,distil')
    parser.add_argument('--work', type=Path, help="folder for decoded films and weights; default: a temporary one")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work or Path(temporary)
        os.environ['CXR_CACHE'] = str(folder/'cache')
        kept = Kept(options.out, folder, {k: str(v) for k, v in vars(options).items()})
        shared = folder, options.limit, options.tiny
        pool = Processes(options.processes, *shared) if options.processes else Here(*shared)
        try:
            tables = prepare(kept, *shared, options.parts.split(','))
            plan = Plan(options.parts.split(','), options.seconds - (time.time() - kept.started), kept, tables, options.tiny)
            run(plan, kept, pool, options.tiny)
        finally:
            pool.close()
        kept.facts['seconds'] = round(time.time() - kept.started, 1)
        kept.write()
    print(f"{len(kept.facts['jobs'])} jobs, {len(kept.facts['failed'])} failed, {kept.facts['seconds']} s", flush=True)


if __name__ == '__main__': main()
