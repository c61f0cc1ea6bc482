"""Networks of both editions on films with covered regions and pasted marks (plan, look 6).

  films     Kaggle's test, and every third child of validation (fold 0), squashed to 224 pixels and changed there
  phantoms  a small residual network trained on drawn films, whose lungs are known exactly

Covered pixels get the mean grey level of the pixels that stay. The logits of `first_edition`, the network that was
shipped before, were computed with its bundle at commit 9dcd33e. --out gets films.npz and phantoms.npz: logits by
network/split/change. A call that was killed goes on with the next change. Nothing is chosen here.

usage: covered_films.py PART [PART ...] [--out FOLDER] [--networks NAME ...] [--splits test val]
CXR_DATA has to hold chest_xray.
"""

import argparse
import dataclasses
import functools
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.numpy import load_file

from cxr_study.core.run import atomic_write, root
from cxr_study.data import phantom as drawing
from cxr_study.data.cache import decoded
from cxr_study.data.images import Preprocess
from cxr_study.data.sets import load_dataset, phantom
from cxr_study.train.networks import Classifier, create_body
from cxr_study.train.recipe import Recipe
from cxr_study.train.training import Training, TrainingData, predict_logits, train

# --- Regions: (left, top, right, bottom) as shares of the side of a squashed film ---

LUNGS = ((0.13, 0.16, 0.43, 0.80), (0.57, 0.16, 0.87, 0.80))  # Set on the mean training film
BORDER = 0.12  # Width of the frame
CORNER = 0.15  # Side of a corner's square
MARKS = dict(R=0.13, time=0.06, KV=0.06)  # Height of the letters, share of the side
EDITION = root() / 'results/second_edition'
ARCHS = dict(distilled='resnet18', efficientnet='tf_efficientnetv2_b0')
FOLDERS = dict(
    distilled='chest_xray-resnet18-distilled/seed0',
    efficientnet='chest_xray-tf_efficientnetv2_b0/seed0',
)
KEYS = dict(  # Of the trainings of the second edition
    distilled='distil-chest_xray-resnet18-wide-seed0',
    efficientnet='seeds-chest_xray-tf_efficientnetv2_b0-wide-seed0',
)
FIXED = ('clean', 'centre covered', 'only centre', 'only border', 'only corners')
CHANGES = (*FIXED, *(f'mark {name}' for name in MARKS))
PHANTOM_CHANGES = (*FIXED, 'lungs covered', 'only lungs')


def lung_boxes(side):
    "bool [side, side]: inside the pair of boxes"
    inside = np.zeros((side, side), bool)
    for box in LUNGS:
        left, top, right, bottom = (round(side * share) for share in box)
        inside[top:bottom, left:right] = True
    return inside


def border(side):
    "bool [side, side]: the outer frame"
    inside = np.ones((side, side), bool)
    width = round(side * BORDER)
    inside[width:-width, width:-width] = False
    return inside


def corners(side):
    "bool [side, side]: the four corners"
    line = np.zeros(side, bool)
    width = round(side * CORNER)
    line[:width] = True
    line[-width:] = True
    return line[:, None] & line[None, :]


def cover(image, covered):  # uint8 [H, W]; bool [H, W]
    "The film with the covered pixels at the mean of the others, so that they leave no trace"
    changed = image.copy()
    changed[covered] = round(float(image[~covered].mean()))
    return changed


def paste(image, name, rng):  # uint8 [H, W]; of `MARKS`; NumPy generator
    "The film with a mark at a random place near its upper left or right corner"
    side = len(image)
    text = dict(R="R", time=f"{rng.integers(24):02d}:{rng.integers(60):02d}", KV="KV59")[name]
    font = ImageFont.load_default(size=side * MARKS[name])
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    width = draw.textlength(text, font=font)
    x = rng.uniform(0.02, 0.08) * side
    if rng.random() < 0.5:
        x = side - width - x
    y = rng.uniform(0.02, 0.08) * side
    draw.text((x, y), text, fill=255, font=font)
    return np.asarray(picture)


def changed(images, name, lungs=None):  # uint8 [n, H, W]; of `CHANGES`; exact bool [n, H, W]
    "The films under a change"
    if name == 'clean':
        return np.array(images)
    if name.startswith('mark '):
        rng = np.random.default_rng(0)
        return np.stack([paste(image, name.removeprefix('mark '), rng) for image in images])
    side = images.shape[-1]
    regions = {
        'centre covered': lung_boxes(side),
        'only centre': ~lung_boxes(side),
        'only border': ~border(side),
        'only corners': ~corners(side),
    }
    if name in regions:
        return np.stack([cover(image, regions[name]) for image in images])
    exact = lungs if name == 'lungs covered' else ~lungs
    return np.stack([cover(image, mask) for image, mask in zip(images, exact)])


# --- Networks: uint8 [n, 224, 224] -> logits [n] ---


def logits_of(model, images):
    return predict_logits(model, images, np.arange(len(images)), 32, 'cpu')


def edition_state(name):  # Of `KEYS`
    "Tensors of a training of the second edition, from its own file or from files of several trainings"
    file = EDITION / FOLDERS[name] / 'model.safetensors'
    if file.is_file():
        return load_file(file)
    own = {}
    prefix = f'{KEYS[name]}/'
    for file in sorted(EDITION.glob('call*/weights-*.safetensors')):
        tensors = load_file(file)
        own |= {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return own


def edition_network_module(name):  # Of `KEYS`
    "A network of the second edition from its weights in half precision, in evaluation mode"
    model = Classifier(create_body(ARCHS[name]), Preprocess(224, standardise='image'))
    tensors = {k: torch.tensor(v) for k, v in edition_state(name).items()}
    floats = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    model.load_state_dict(floats)
    return model.eval()


def edition_network(name):  # Of `KEYS`
    "The same as a function of films"
    return functools.partial(logits_of, edition_network_module(name))


NETWORKS = dict(  # Name -> function that makes the network
    efficientnet=functools.partial(edition_network, 'efficientnet'),
    distilled=functools.partial(edition_network, 'distilled'),
)


# --- What is written ---


@dataclasses.dataclass
class Logits:
    "Logits by network/split/change in one .npz, written anew after each"

    path: Path

    def __post_init__(self):
        self.found = {}
        if self.path.exists():
            with np.load(self.path) as stored:
                self.found = dict(stored)

    def compute(self, name, network, change):  # Images -> logits; function that makes the images
        "Compute the logits unless they are there"
        if name in self.found:
            return
        began = time.time()
        self.found[name] = np.asarray(network(change()), np.float32)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as file, open(file, 'wb') as stream:
            np.savez_compressed(stream, **self.found)
        print(f"{name}: {time.time() - began:.0f} s", flush=True)


# --- Parts ---


def film_rows(edition):
    "Split -> positions in chest_xray: all test films, and those of every third child of validation"
    facts = json.loads((edition / 'second_edition.json').read_text())
    films = pd.DataFrame(facts['films']['chest_xray'])
    val = films[films.fold == 0]
    children = sorted(val.patient_id.unique())[::3]
    of_children = val.index[val.patient_id.isin(children)]
    return dict(test=np.flatnonzero(films.fold == -2), val=of_children.to_numpy())


def mean_film(images, edition):
    "The mean of the training films (fold 0 and the test left out), a picture of no child"
    facts = json.loads((edition / 'second_edition.json').read_text())
    fold = np.array(facts['films']['chest_xray']['fold'])
    rows = np.flatnonzero((fold != 0) & (fold != -2))
    total = np.zeros(images.shape[1:])
    for row in rows:
        total += images[row]
    return Image.fromarray(np.rint(total / len(rows)).astype(np.uint8))


def films(options):
    image_set = load_dataset('chest_xray')
    facts = json.loads((options.edition / 'second_edition.json').read_text())
    assert facts['films']['chest_xray']['image_id'] == list(image_set.table.image_id)
    images, _, _ = decoded(image_set, Preprocess(224), options.cache)
    mean_film(images, options.edition).save(options.out / 'mean_film.png')
    kept = Logits(options.out / 'films.npz')
    splits = film_rows(options.edition)
    for name in options.networks:
        wanted = [(split, change) for split in options.splits for change in CHANGES]
        missing = [(s, c) for s, c in wanted if f'{name}/{s}/{c}' not in kept.found]
        network = NETWORKS[name]() if missing else None
        for split, change in missing:
            make_images = functools.partial(changed, images[splits[split]], change)
            kept.compute(f'{name}/{split}/{change}', network, make_images)


def exact_lungs(row, pixels, seed=0):  # Row of `phantom_table`
    "bool [pixels, pixels]: the lungs of a phantom, as `draw_phantom` draws them"
    patient_rng, rng = drawing._generators(row.image_id, seed)
    anatomy = drawing._anatomy(patient_rng)
    x, y = drawing._grid(pixels)
    shift = drawing._LARGEST_SHIFT
    shifted_x = x + rng.uniform(-shift, shift)
    shifted_y = y + rng.uniform(-shift, shift)
    return drawing._lungs(anatomy, shifted_x, shifted_y, row.view == 'AP') > 0.05


def phantom_films(images=1200, pixels=64):
    "(table with `split` and `row`, uint8 [n, pixels, pixels], exact lungs of the test)"
    drawn = phantom(images=images, pixels=pixels)
    pictures = np.stack([drawn.source(i) for i in range(len(drawn))])
    table = drawn.table.assign(row=np.arange(len(drawn)), split=drawn.table.official)
    held_out = table.patient_id.isin(table.patient_id.unique()[::6]) & (table.split == 'train')
    table.loc[held_out, 'split'] = 'val'
    test = table[table.split == 'test']
    lungs = np.stack([exact_lungs(row, pixels) for row in test.itertuples()])
    return table, pictures, lungs


def phantoms(options):
    kept = Logits(options.out / 'phantoms.npz')
    table, pictures, lungs = phantom_films()
    training = Training('test_resnet', 'none', Recipe(epochs=6, lr=0.005), 0)
    checkpoint = options.out / 'phantoms.pt'
    data = TrainingData(pictures, table, Preprocess(64, standardise='image'))
    model, _ = train(training, data, checkpoint, lambda line: print(line, flush=True), 'cpu')
    checkpoint.unlink(missing_ok=True)
    test = pictures[table.row[table.split == 'test']]
    network = functools.partial(logits_of, model)
    for change in PHANTOM_CHANGES:
        make_images = functools.partial(changed, test, change, lungs)
        kept.compute(f'phantom/test/{change}', network, make_images)


PARTS = dict(films=films, phantoms=phantoms)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('parts', nargs='+', choices=list(PARTS))
    parser.add_argument('--out', type=Path, default=EDITION / 'covered')
    parser.add_argument('--edition', type=Path, default=EDITION / 'call1')
    parser.add_argument('--cache', type=Path)
    parser.add_argument('--networks', nargs='+', choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument('--splits', nargs='+', choices=['test', 'val'], default=['test', 'val'])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for part in options.parts:
        PARTS[part](options)


if __name__ == '__main__':
    main()
