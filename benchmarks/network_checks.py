"""What the results pages show of one network: the published run in FOLDER.

  corruptions  13 corruptions at 5 severities       -> results/robustness/second_edition.npz
  acquisition  exposure, contrast, position, ...    -> results/robustness/stress-second_edition.npz
  shapes       the film made wider or narrower       -> results/robustness/shapes.csv
  maps         sanity checks of heat maps           -> results/explanation/maps.npz
  other        familiarity of each film             -> results/external/second_edition-familiarity.csv

The first two take the validation films of every fourth child, decoded at the network's size. `maps` takes validation
films that the network calls pneumonia. `other` says of every film of validation, test and NIH
ChestX-ray14 how unfamiliar it is: a film with a score above 1 is refused.

usage: network_checks.py PART [PART ...] [--run FOLDER]
CXR_DATA has to hold chest_xray, and nih_chestxray14 for `other`.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from covered_films import edition_network_module
from second_edition_tables import films_of, read, rows_of

sys.path.insert(0, str(Path(__file__).parents[1] / 'tools'))
from notebook_functions import functions_of

from cxr_study.core.run import Run, atomic_write, root
from cxr_study.data.images import Preprocess
from cxr_study.data.sets import load_dataset
from cxr_study.explain.attribution import ExplainableModel, explain_all, outcome_rows
from cxr_study.pipeline.export import run_onnx, to_onnx
from cxr_study.predict.familiarity import Familiarity
from cxr_study.robust import corruptions
from cxr_study.robust.familiarity_fit import features_and_images
from cxr_study.train.networks import load_model
from cxr_study.train.recipe import Recipe
from cxr_study.train.training import Training

RESULTS = root() / 'results'
NETWORK = 'chest_xray-tf_efficientnetv2_b0'
EDITION = RESULTS / 'second_edition'


def say(line):
    print(time.strftime('%H:%M:%S'), line, flush=True)


def validation(run, every=1):  # Take the films of every n-th child
    "(films uint8 [n, side, side], their rows of split.csv)"
    side = Preprocess.from_dict(run.read('preprocess.json')).size
    images, rows = corruptions.decoded_split(run, side, 'val')
    children = sorted(rows.patient_id.unique())[::every]
    chosen = rows.patient_id.isin(children).to_numpy()
    return images[chosen], rows[chosen].reset_index(drop=True)


# --- Corruptions and acquisition


def write_sweep(run, file, names, change):  # .npz; settings; (films, setting) -> films
    "Logits of the validation films of every fourth child under each setting, by the network as it is served"
    images, rows = validation(run, every=4)
    say(f"{file.name}: {len(rows)} films of {rows.patient_id.nunique()} children")
    network = to_onnx(load_model(run))
    logits = {}
    for name in names:
        logits[name] = run_onnx(network, change(images, name))[:, 0]
        say(name)
    corruptions.write_logits(file, rows, logits, corruptions.calibration_of(run))


def write_corruptions(run):
    file = RESULTS / 'robustness/second_edition.npz'
    write_sweep(run, file, corruptions.settings(), corruptions.variant)


def write_acquisition(run):
    shape = functions_of('results/03_shape')
    file = RESULTS / 'robustness/stress-second_edition.npz'
    write_sweep(run, file, shape.stress_settings(), shape.stressed)


SHAPES_OF_VAL = dict(narrower=0.8, plain=1.0, wider=1.25)  # Version -> width, relative to the film


def write_shapes(run):
    "Add the network to shapes.csv, from the logits that the GPU gave; no network runs here"
    shape = functions_of('results/03_shape')
    facts, logits = read(*sorted(EDITION.glob('call*')))
    key = run.manifest['training']['key']
    (job,) = [entry['job'] for entry in facts['jobs'] if entry['key'] == key]
    films = dict(zip(('val', 'test'), rows_of(films_of(facts, 'chest_xray'), job)))
    keys = dict(
        val={width: f'{key}/val/{version}' for version, width in SHAPES_OF_VAL.items()},
        test={width: f'{key}/test/{width:g}' for width in shape.SHAPES},
    )
    parts = []
    for split, names in keys.items():
        of_split = {width: logits[name] for width, name in names.items()}
        parts.append(shape.shape_rows(films[split], of_split).assign(split=split))
    file = RESULTS / 'robustness/shapes.csv'
    stored = pd.read_csv(file)
    tables = {name: stored[stored.network == name] for name in ('equalise', 'stretch')}
    shape.write_shapes(tables | dict(second_edition=pd.concat(parts)), file)


# --- Heat maps


def network_of_wrong_labels(run, images, rows):  # Training films and their rows
    "A network of the same architecture that memorised these films with permuted labels"
    maps = functions_of('results/07_maps')
    facts = run.read('model.json')
    unregularised = dict(augment='none', dropout=0.0, weight_decay=0.0)
    recipe = Recipe(epochs=10, batch_size=16, lr=3e-3, **unregularised)
    training = Training(facts['arch'], facts['weights'], recipe)
    spec = Preprocess.from_dict(run.read('preprocess.json'))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / 'wrong.pt'
        model, history = maps.train_on_permuted_labels(
            training, images, rows, spec, checkpoint, say=say, device='cpu'
        )
    say(f"AUC for the permuted labels of the films it learned: {history.valid_auc.max():.3f}")
    return model, float(history.valid_auc.max())


def training_films(run, number):
    "(films, rows whose `row` counts these films) of a random sample of training"
    rows = run.read('split.csv')
    rows = rows[rows.split == 'train'].sample(number, random_state=0)
    films = load_dataset('chest_xray')
    assert list(films.table.image_id.iloc[rows.row]) == list(rows.image_id)
    spec = Preprocess.from_dict(run.read('preprocess.json'))
    images = np.stack([spec(films.source(row)) for row in rows.row])
    return images, rows.assign(row=np.arange(number))


def called_pneumonia(run, images, rows, number):
    "(films, rows) of the first `number` validation films that the network calls pneumonia at its threshold in use"
    calibration = corruptions.calibration_of(run)
    predictions = run.read('predictions.csv')
    calibrated = predictions.assign(logit=calibration.logit(predictions.logit))
    called = outcome_rows(calibrated, 'val', calibration.point())
    called = called[called.called == 1].head(number)
    place = dict(zip(rows.image_id, range(len(rows))))
    return images[called.image_id.map(place)], called


def write_maps(run, number=100):
    "Values of each film in each test, by method and measure"
    maps = functions_of('results/07_maps')
    wrong, memorised = network_of_wrong_labels(run, *training_films(run, number))
    images, rows = called_pneumonia(run, *validation(run), number)
    say(f"{len(rows)} films of {rows.patient_id.nunique()} children")
    models = [load_model(run), edition_network_module('distilled')]
    inside = ExplainableModel(models[0])
    found = {}
    for method, own in explain_all(inside, images, maps.METHODS_TESTED).items():
        for measure, values in maps.floor(own).items():
            found[f'{method}/floor/{measure}'] = values
    cascades = maps.cascade(inside, images, maps.METHODS_TESTED)
    for method, shares in cascades.items():
        for share, measures in shares.items():
            for measure, values in measures.items():
                found[f'{method}/cascade {share:g}/{measure}'] = values
    say("weights made random")
    values = maps.values_of_tests(inside, images, cascades, wrong, models)
    for method, tests in values.items():
        for test, measures in tests.items():
            for measure, of_films in measures.items():
                found[f'{method}/{test}/{measure}'] = of_films
    arrays = {name: np.asarray(values, np.float32) for name, values in found.items()}
    for column in ('image_id', 'patient_id'):
        arrays[column] = rows[column].to_numpy(object).astype(str)
    file = RESULTS / 'explanation/maps.npz'
    file.parent.mkdir(exist_ok=True)
    with atomic_write(file) as f, open(f, 'wb') as out:
        np.savez_compressed(out, memorised=memorised, **arrays)


# --- Familiarity


def write_other(run):
    "Score of the run's familiarity check for every film of validation, test and the other hospital, 1 at its threshold"
    spec = Preprocess.from_dict(run.read('preprocess.json'))
    model = load_model(run)
    gate = Familiarity.from_dict(run.read('familiarity.json'))
    nih = load_dataset('nih_chestxray14')
    images = np.stack([spec(nih.source(i)) for i in range(len(nih))])
    other = nih.table.assign(image_id=nih.name + '/' + nih.table.image_id.astype(str))
    parts = dict(nih=(images, other))
    for split in ('val', 'test'):
        images, part = corruptions.decoded_split(run, spec.size, split)
        parts[split] = images, part
    scored = []
    for split, (images, part) in parts.items():
        score = gate.score(*features_and_images(model, images, range(len(part)))) / gate.threshold
        columns = part[['image_id', 'label']].assign(split=split, score=score.round(4))
        scored.append(columns)
        say(f"{split}: {np.mean(score > 1):.3f} of {len(part)} films refused")
    with atomic_write(RESULTS / 'external/second_edition-familiarity.csv') as file:
        pd.concat(scored).to_csv(file, index=False)


PARTS = dict(
    corruptions=write_corruptions,
    acquisition=write_acquisition,
    shapes=write_shapes,
    maps=write_maps,
    other=write_other,
)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('parts', nargs='+', choices=list(PARTS))
    parser.add_argument('--run', type=Path, default=EDITION / NETWORK / 'seed0')
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    run = Run(options.run)
    for part in options.parts:
        PARTS[part](run)


if __name__ == '__main__':
    main()
