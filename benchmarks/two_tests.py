"""What PneumoniaMNIST's test and Kaggle's have in common, and what their other normals look like. No network is used.

usage: two_tests.py [--greedy chest_xray_matches.csv] [--out results/two_tests]

CXR_DATA has to hold pneumoniamnist, chest_xray and, for the control, native. Minutes on two cores. Writes

    films.csv      features of each film of the two tests, by set
    features.csv   how well each feature tells a test's other normals from the common ones, with intervals
    native.csv     the match of native files, whose width over height is known
    greedy.csv     every row in which a simpler greedy match differs, with the reason
    facts.json     numbers that are quoted in nbs/results/02_two_tests
"""

import argparse
import os
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.ndimage import binary_dilation, find_objects, label, white_tophat
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeCV
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cxr_study.core.run import atomic_write, root, sha256, to_json
from cxr_study.data.cache import decoded
from cxr_study.data.images import Preprocess
from cxr_study.data.match import match_films, test_part
from cxr_study.data.sets import load_dataset, pneumoniamnist_matches

SIDE = 112  # Pixels of a squashed film
SMALL = 28  # Pixels of what is compared by neighbours and by grey levels
NEIGHBOURS = 10
REPLICATES = 1000

# --- Features of a film ---


def grey_levels(images):  # uint8 [N, H, W]
    "Table of grey levels: mean, contrast, dark and light end, and the mean of the outer frame"
    pixels = images.reshape(len(images), -1).astype(np.float32)
    dark, light = np.percentile(pixels, [5, 95], axis=1)
    frame = np.ones(images.shape[1:], bool)
    width = max(1, images.shape[1] // 14)
    frame[width:-width, width:-width] = False
    return pd.DataFrame(
        dict(
            mean=pixels.mean(axis=1),
            contrast=pixels.std(axis=1),
            dark=dark,
            light=light,
            frame=images[:, frame].mean(axis=1),
        )
    )


STROKE = 7  # Pixels; what is lighter than its surroundings and narrower may be writing
STEP = 40  # Grey levels by which writing is lighter than its surroundings
AREA = (4, 150)  # Pixels of a letter
LONGEST = 18  # Pixels of its height or width; edges of ribs and of the skin are longer
OUTER = 0.2  # Part of each side in which markers and overlays stand
CLEAR = 5  # Standard deviations of the background by which a letter is lighter than it
RING = 2  # Pixels around a letter that are looked at


def is_letter(film, area, place):  # uint8 [SIDE, SIDE]; bool [SIDE, SIDE] of one area; its slices
    "Whether a bright area is small, near the border and on an even background"
    rows, columns = place
    height = rows.stop - rows.start
    width = columns.stop - columns.start
    if not AREA[0] <= area[place].sum() <= AREA[1] or max(height, width) > LONGEST:
        return False
    side = len(film)
    depth_rows = min(rows.start, side - rows.stop) / side
    depth_columns = min(columns.start, side - columns.stop) / side
    if min(depth_rows, depth_columns) >= OUTER:
        return False
    around = tuple(slice(max(0, part.start - RING - 1), part.stop + RING + 1) for part in place)
    inner = binary_dilation(area[around])
    ring = binary_dilation(inner, iterations=RING) & ~inner
    background = film[around][ring]
    return film[place].max() - background.mean() > CLEAR * background.std()


def writing(film):  # uint8 [SIDE, SIDE]
    "(number, pixels) of small bright areas on an even background near the border, a proxy for markers and overlays"
    bright = white_tophat(film, size=STROKE) > STEP
    areas, _ = label(bright, structure=np.ones((3, 3)))
    sizes = []
    for number, place in enumerate(find_objects(areas), start=1):
        area = areas == number
        if is_letter(film, area, place):
            sizes.append(area.sum())
    return len(sizes), int(sum(sizes))


def neighbours(small, is_train, label_, patients):  # Grey levels [N, SMALL, SMALL]
    "Share of pneumonia among the nearest training films of other children, by 50 principal components of the pixels"
    pixels = small.reshape(len(small), -1).astype(np.float32)
    pixels -= pixels.mean(axis=1, keepdims=True)
    pixels /= np.maximum(pixels.std(axis=1, keepdims=True), 1)
    components = PCA(50, random_state=0).fit(pixels[is_train]).transform(pixels)
    train = np.flatnonzero(is_train)
    nearest = NearestNeighbors(n_neighbors=NEIGHBOURS + 60).fit(components[train])
    _, found = nearest.kneighbors(components)
    shares = []
    for i, row in enumerate(train[found]):
        others = row[patients[row] != patients[i]][:NEIGHBOURS]
        shares.append(label_[others].mean())
    return np.array(shares)


def estimated_ratio(small, ratio, is_train, patients):  # Squashed films [N, SMALL, SMALL]
    "(width over height estimated from the picture, without the child's own films; median error in training)"
    pixels = small.reshape(len(small), -1).astype(np.float32)
    model = make_pipeline(
        StandardScaler(), PCA(150, random_state=0), RidgeCV(np.logspace(-1, 4, 11))
    )
    known = is_train & np.isfinite(ratio)
    target = np.log(ratio[known])
    within = cross_val_predict(
        model, pixels[known], target, groups=patients[known], cv=GroupKFold(5)
    )
    estimate = np.exp(model.fit(pixels[known], target).predict(pixels))
    estimate[known] = np.exp(within)
    error = np.median(np.abs(estimate[known] / ratio[known] - 1))
    return estimate, float(error)


# --- The films of both data sets ---


def described(image_set):
    "Columns that the two tables share: where a film stands"
    table = image_set.table
    part = pd.Series(test_part(table.image_id))
    train = np.where(table.label == 1, 'training pneumonias', 'training normals')
    test = np.where(table.label == 1, 'test pneumonias', part)
    return table[['image_id', 'patient_id', 'label']].assign(
        data=image_set.name, set=np.where(part == '', train, test)
    )


def ratios_of(table, column):
    "Width over height of each film by the match; NaN where it has no partner"
    matches = pneumoniamnist_matches()
    known = dict(zip(matches[column], matches.ratio))
    return table.image_id.map(known).to_numpy(float)


def kaggle_films():
    image_set = load_dataset('chest_xray')
    films, _, _ = decoded(image_set, Preprocess(SIDE))
    films = np.asarray(films)
    small = films.reshape(len(films), SMALL, SIDE // SMALL, SMALL, SIDE // SMALL).mean((2, 4))
    table = described(image_set)
    is_train = table.set.str.startswith('training').to_numpy()
    patients = table.patient_id.to_numpy()
    ratio = ratios_of(table, 'file')
    estimate, error = estimated_ratio(small, ratio, is_train, patients)
    marks = [writing(film) for film in films]
    table = table.join(grey_levels(films)).assign(
        letters=[count for count, _ in marks],
        writing=[area for _, area in marks],
        ratio=ratio,
        estimated_ratio=estimate,
        like_pneumonia=neighbours(small, is_train, table.label.to_numpy(), patients),
    )
    return table, error


def mnist_films():
    image_set = load_dataset('pneumoniamnist')
    small = np.stack([image_set.source(i) for i in range(len(image_set))])
    table = described(image_set)
    is_train = table.set.str.startswith('training').to_numpy()
    patients = table.patient_id.to_numpy()
    ratio = ratios_of(table, 'image_id')
    return table.join(grey_levels(small)).assign(
        ratio=ratio,
        like_pneumonia=neighbours(small, is_train, table.label.to_numpy(), patients),
    )


# --- Differences with intervals ---

FEATURES = dict(
    chest_xray=(
        'mean',
        'contrast',
        'dark',
        'light',
        'frame',
        'letters',
        'writing',
        'estimated_ratio',
        'like_pneumonia',
    ),
    pneumoniamnist=('mean', 'contrast', 'dark', 'light', 'frame', 'like_pneumonia'),
)


def draws(films, replicates, seed=0):
    "Lists of rows: children drawn with replacement, each with all its films"
    rng = np.random.default_rng(seed)
    rows = list(films.reset_index().groupby('patient_id').groups.values())
    for _ in range(replicates):
        chosen = rng.integers(0, len(rows), len(rows))
        yield np.concatenate([rows[k] for k in chosen])


def compared(films, feature, first, second, replicates=REPLICATES):
    "Medians of two sets, and the AUC of telling `second` from `first` by one feature, with an interval over children"
    films = films[films.set.isin([first, second])].reset_index(drop=True)
    is_second = (films.set == second).to_numpy()
    values = films[feature].to_numpy(float)
    aucs = []
    for rows in draws(films, replicates):
        if 0 < is_second[rows].sum() < len(rows):
            aucs.append(roc_auc_score(is_second[rows], values[rows]))
    lower, upper = np.percentile(aucs, [2.5, 97.5])
    return dict(
        first=first,
        second=second,
        feature=feature,
        median_first=np.median(values[~is_second]),
        median_second=np.median(values[is_second]),
        auc=roc_auc_score(is_second, values),
        lower=lower,
        upper=upper,
    )


PAIRS = (('common', 'other normals'), ('training normals', 'training pneumonias'))


def feature_table(films, replicates=REPLICATES):
    "A row for each data set, pair of sets and feature"
    rows = []
    for data, features in FEATURES.items():
        of_data = films[films.data == data]
        for feature in features:
            for first, second in PAIRS:
                few = replicates if first == 'common' else max(100, replicates // 10)
                rows.append(dict(data=data) | compared(of_data, feature, first, second, few))
    return pd.DataFrame(rows)


# --- The match against native files and against a greedy match ---


def native_control():
    "A row for each native file: its image and correlation by its known ratio, beside the table's from squashed files"
    folder = Path(os.environ['CXR_DATA']) / 'native'
    found = match_films(load_dataset('pneumoniamnist'), load_dataset(folder))
    found = found[(found.file != '')][['file', 'image_id', 'ratio', 'correlation']]
    matches = pneumoniamnist_matches()
    squashed = matches[matches.file != ''].set_index('file').loc[found.file]
    return found.assign(
        squashed_image_id=squashed.image_id.to_numpy(),
        squashed_ratio=squashed.ratio.to_numpy(),
        squashed_correlation=squashed.correlation.to_numpy(),
    ).sort_values('file')


def hashes_of(image_set):
    "Image id -> SHA-256 of its pixels or file"
    found = {}
    for i, image_id in enumerate(image_set.table.image_id):
        source = image_set.source(i)
        content = source.read_bytes() if isinstance(source, Path) else source.tobytes()
        found[image_id] = sha256(content)
    return found


def reason(row, images, files):
    "Why one row of the greedy match differs"
    if row.greedy and images[row.greedy] == images.get(row.image_id):
        return 'the two images are identical; the greedy match gave one of them to several files'
    if row.greedy and not row.image_id:
        copies = [f for f, content in files.items() if content == files[row.file] and f != row.file]
        return f'the file is a copy of {copies[0]}, which has the image' if copies else ''
    if not row.greedy:
        return 'the greedy match found no image; this correlation is the highest of both by far'
    return ''


def against_greedy(path):
    "Every film for which a greedy match (`file, mnist_split, mnist_index, correlation`) has another image"
    greedy = pd.read_csv(path, dtype=str, keep_default_na=False)
    greedy['greedy'] = [
        f"{split}-{int(index):04d}" if split else ''
        for split, index in zip(greedy.mnist_split, greedy.mnist_index)
    ]
    matches = pneumoniamnist_matches()
    both = greedy[['file', 'greedy']].merge(matches[matches.file != ''], on='file')
    differ = both[both.greedy != both.image_id]
    images, files = (hashes_of(load_dataset(name)) for name in ('pneumoniamnist', 'chest_xray'))
    reasons = [reason(row, images, files) for row in differ.itertuples()]
    columns = ['file', 'image_id', 'greedy', 'correlation', 'margin']
    return differ[columns].assign(reason=reasons)


def main(out, greedy=None):
    kaggle, error = kaggle_films()
    films = pd.concat([kaggle, mnist_films()], ignore_index=True)
    of_tests = films[~films.set.str.startswith('training')]
    tables = dict(films=of_tests, features=feature_table(films))
    if (Path(os.environ['CXR_DATA']) / 'native').is_dir():
        tables['native'] = native_control()
    if greedy:
        tables['greedy'] = against_greedy(greedy)
    for name, table in tables.items():
        with atomic_write(Path(out) / f'{name}.csv') as path:
            table.to_csv(path, index=False, float_format='%.5g', lineterminator='\n')
    with atomic_write(Path(out) / 'facts.json') as path:
        path.write_text(to_json(dict(ratio_error=error, neighbours=NEIGHBOURS)))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, default=root() / 'results/two_tests')
    parser.add_argument('--greedy', type=Path)
    options = parser.parse_args()
    main(options.out, options.greedy)
