"""The films of ANALYSIS_PLAN.md: tables with children, folds and shapes; pixels squashed, cropped or perturbed."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from cxr_study.core.run import atomic_write, sha256
from cxr_study.data.cache import decoded
from cxr_study.data.images import Preprocess
from cxr_study.data.sets import kermany_names, load_dataset, sample_patients, take
from cxr_study.data.splits import make_split
from cxr_study.train.loaders import STRESS, stress_tables, stretch_images

WIDE = 1.35  # Width over height from which a film is called wide
SHAPES = (0.67, 0.8, 0.9, 1.0, 1.11, 1.25, 1.5)
VERSIONS = (*STRESS, 'narrower', 'wider')  # The seven versions of a validation film


def matches():
    "Table of chest_xray's files with their ratio and the PneumoniaMNIST image of the same film"
    return pd.read_csv(
        Path(os.environ['CXR_DATA']) / 'chest_xray_matches.csv',
        keep_default_na=False,
        dtype=dict(mnist_index=str),
    )


def chest_films(limit=0):
    image_set = sample_patients(load_dataset('chest_xray'), limit)
    ratio = matches().set_index('file').width_over_height
    return image_set, image_set.table.image_id.map(ratio).to_numpy(float)


def mnist_films(limit=0):
    "PneumoniaMNIST with the children of the match; of train and val, copies and films without a match are left out"
    image_set, found = load_dataset('pneumoniamnist'), matches()
    found = found[found.mnist_split != ''].assign(
        image_id=lambda m: [f"{s}-{int(i):04d}" for s, i in zip(m.mnist_split, m.mnist_index)]
    )
    found = found.drop_duplicates('image_id').reset_index(drop=True)
    official = [f.split('/')[0] for f in found.file]
    found['child'] = kermany_names(
        [Path(f).name for f in found.file], official
    ).patient_id.to_numpy()
    table = image_set.table.merge(
        found[['image_id', 'child', 'width_over_height']], 'left', 'image_id'
    )
    table['patient_id'] = table.child.fillna(table.image_id)
    test = (table.official == 'test').to_numpy()
    copied = pd.Series(
        [sha256(np.ascontiguousarray(image_set.source(i)).data) for i in range(len(table))]
    )
    order = (
        table.child.isna().sort_values(kind='stable').index
    )  # Of copies, one with a child is kept
    copied = copied[order].duplicated().sort_index().to_numpy()
    kept = np.flatnonzero(test | ~(table.child.isna().to_numpy() | copied))
    named = replace(
        image_set, table=table.drop(columns=['child', 'width_over_height']), patients_known=True
    )
    named = take(named, kept)
    ratio = table.width_over_height.to_numpy(float)[kept]
    if limit:
        few = sample_patients(replace(named, table=named.table.assign(ratio=ratio)), limit)
        named, ratio = (
            replace(few, table=few.table.drop(columns='ratio')),
            few.table.ratio.to_numpy(),
        )
    return named, ratio


def fitted(image, ratio, size, geometry):  # uint8 [224, 224] squashed film; its width over height
    "uint8 [size, size]: the true central square, or the whole film in black bars"
    h, w = image.shape
    picture = Image.fromarray(image)
    across, down = min(1, 1 / ratio), min(1, ratio)
    if geometry == 'crop':
        box = (w * (1 - across) / 2, h * (1 - down) / 2, w * (1 + across) / 2, h * (1 + down) / 2)
        return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR, box=box))
    inner = (max(1, round(size * down)), max(1, round(size * across)))
    whole = Image.new('L', (size, size))
    whole.paste(
        picture.resize(inner, Image.Resampling.BILINEAR),
        ((size - inner[0]) // 2, (size - inner[1]) // 2),
    )
    return np.asarray(whole)


def marked(image, rng):  # uint8 [H, W]; NumPy generator
    "The film with a letter, a time stamp or a line of the exposure at a random place of its upper or lower part"
    h, w = image.shape
    words = [
        rng.choice(['R', 'L']),
        f"{rng.integers(24):02d}:{rng.integers(60):02d}",
        f"KV{rng.integers(50, 75)}",
    ]
    words = str(words[rng.integers(3)])
    font = ImageFont.load_default(
        size=int(h * (rng.uniform(0.08, 0.16) if len(words) == 1 else rng.uniform(0.04, 0.08)))
    )
    x, y = (
        rng.uniform(0, 0.8) * w,
        (rng.uniform(0, 0.15) if rng.random() < 0.5 else rng.uniform(0.75, 0.9)) * h,
    )
    picture = Image.fromarray(image)
    ImageDraw.Draw(picture).text((x, y), words, fill=int(rng.integers(180, 256)), font=font)
    return np.asarray(picture)


class Films:
    "A data set's table and its images in the sizes and geometries asked for; what one process made, others read"

    def __init__(self, folder, data, limit=0, tiny=False):
        self.folder, self.data, self.limit, self.native = (
            Path(folder),
            data,
            limit,
            32 if tiny else 224,
        )

    def kept(self, name, make):
        "The array `make()` gives, as a read-only memory map of a file"
        path = self.folder / f'{self.data}-{name}.npy'
        if not path.exists():
            made = make()
            with atomic_write(path) as f:
                if isinstance(made, np.memmap):
                    os.link(made.filename, f)
                else:
                    with open(f, 'wb') as stream:
                        np.save(stream, made)
        return np.load(path, mmap_mode='r')

    @cache
    def source(self):
        "(`ImageSet`, width over height)"
        return (chest_films if self.data == 'chest_xray' else mnist_films)(self.limit)

    @cache
    def decoded(self, size):
        images, index, _ = decoded(self.source()[0], Preprocess(size=size), self.folder / 'cache')
        return images, index

    @cache
    def table(self, folds=3):
        "image_id, patient_id, label, official, ratio and the fold that a film validates (-1: another; -2: test)"
        path = self.folder / f'{self.data}.pickle'
        if not path.exists():
            with atomic_write(path) as f:
                self.made_table(folds).to_pickle(f)
        return pd.read_pickle(path)

    def made_table(self, folds):
        image_set, ratio = self.source()
        index = self.decoded(self.native)[1]
        split = [
            make_split(image_set, index.sha256, 'grouped', 5, k, 0)[0].split.to_numpy()
            for k in range(folds)
        ]
        table = image_set.table[['image_id', 'patient_id', 'label', 'official']].assign(
            ratio=ratio, row=range(len(ratio))
        )
        fold = np.full(len(table), -1)
        for k, found in enumerate(split):
            fold[found == 'val'] = k
        fold[split[0] == 'test'] = -2
        return table.assign(fold=fold, wide=ratio >= WIDE)

    @cache
    def images(self, size, geometry='squash'):
        "uint8 [N, size, size], a read-only memory map"
        if geometry == 'squash' or self.data != 'chest_xray':
            return self.kept(size, lambda: self.decoded(size)[0])
        return self.kept(f'{geometry}-{size}', lambda: self.shaped(size, geometry))

    def shaped(self, size, geometry):
        whole, ratio = self.images(self.native), self.table().ratio.to_numpy()
        with ThreadPoolExecutor() as pool:
            return np.stack(
                list(
                    pool.map(
                        lambda i: fitted(whole[i], ratio[i], size, geometry), range(len(whole))
                    )
                )
            )


def seven(images):  # uint8 [n, H, W]
    "Version -> uint8 [n, H, W]"
    found = {name: table[images] for name, table in zip(STRESS, stress_tables())}
    return found | dict(narrower=shaped(images, 0.8), wider=shaped(images, 1.25))


def shaped(images, factor):
    "The films made wider by `factor`, or narrower if it is below one"
    return images if factor == 1 else stretch_images(images, max(1, 1 / factor), max(1, factor))


def independent(
    table, copies, seed
):  # Training rows with `label` and `wide`; how many copies of the table
    "Positions into `table`, about `copies` times as many: label and wide are independent, their totals stay"
    rng, n = np.random.default_rng(seed), len(table)
    groups = table.groupby(['label', 'wide']).indices
    label, wide = table.label.value_counts(normalize=True), table.wide.value_counts(normalize=True)
    found = []
    for (y, w), rows in groups.items():
        rows = rng.permutation(rows)
        expected = copies * n * label[y] * wide[w] / len(rows)
        times = np.diff(np.floor(np.arange(len(rows) + 1) * expected + rng.random())).astype(int)
        found.append(np.repeat(rows, times))
    return np.concatenate(found)
