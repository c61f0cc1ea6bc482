"""Tables of predictions from what second_edition.py wrote. A FOLDER holds second_edition.json, seeds.npz, search.npz.

For each training: OUT/<part>/<data>-<network>-<recipe>/seed<k>/ with
  predictions.csv   validation and test, films as they are: the study's table
  versions.csv      validation in the plan's seven versions; image_id ends in #<version>
  shapes.csv        test in the plan's shapes; image_id ends in #<factor>
  other.csv         the other hospital, split `test`
  history.csv, training.json

usage: second_edition_tables.py FOLDER [FOLDER ...] --out OUT [--parts seeds,distil,candidates,grid]
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd

from cxr_study.core.run import StudyError, atomic_write, to_json
from cxr_study.predict.table import write_predictions

TEST = -2  # `fold` of a test film


def read(*folders):  # Where the script wrote, call after call
    "(facts, key of a logit array -> float32 [n]); of a training that several calls finished, the first counts"
    whole, logits = None, {}
    for folder in map(Path, folders):
        facts = json.loads((folder / 'second_edition.json').read_text())
        for name in ('seeds', 'search'):
            if (folder / f'{name}.npz').is_file():
                with np.load(folder / f'{name}.npz') as z:
                    logits = dict(z) | logits
        if whole is None:
            whole = facts
            continue
        if facts['films'] != whole['films']:
            raise StudyError(
                f"{folder} was made from other films than {folders[0]}. Read it alone."
            )
        known = {entry['key'] for entry in whole['jobs']}
        whole['jobs'] += [entry for entry in facts['jobs'] if entry['key'] not in known]
        whole['failed'] += facts['failed']
    return whole, logits


def films_of(facts, data):  # A data set's name
    "Table of its films; `ratio` is NaN where it is not known"
    return pd.DataFrame(facts['films'][data]).astype(dict(patient_id=str))


def rows_of(films, job):  # Table from `films_of`; a job's fields
    "(validation films, test films) of a training, in the order of its logits"
    return [
        films[films.fold == k].drop(columns=['fold', 'official']).assign(split=split)
        for k, split in ((job['fold'], 'val'), (TEST, 'test'))
    ]


def stacked(parts):  # Name of a version -> table with `logit`
    "One table; the version is appended to image_id, and is a column"
    named = [t.assign(image_id=t.image_id + f'#{name}', version=name) for name, t in parts.items()]
    return pd.concat(named, ignore_index=True)


def tables_of(facts, logits, entry):  # From `read`; one of `facts['jobs']`
    "Name of a file -> table of predictions of one training"
    job = entry['job']
    val, test = rows_of(films_of(facts, job['data']), job)
    looked = (
        entry['key'].replace('candidates', 'looks', 1)
        if job['part'] == 'candidates'
        else entry['key']
    )

    def of(key):
        return {
            k.removeprefix(f'{key}/'): v.astype(float)
            for k, v in logits.items()
            if k.startswith(f'{key}/')
        }

    mine, seen = of(entry['key']), of(looked)
    found = {
        'predictions.csv': pd.concat(
            [
                val.assign(logit=mine['val/plain']),
                *([test.assign(logit=seen['test/1'])] if 'test/1' in seen else []),
            ],
            ignore_index=True,
        ),
        'versions.csv': stacked(
            {k[4:]: val.assign(logit=z) for k, z in mine.items() if k.startswith('val/')}
        ),
    }
    shapes = {k[5:]: test.assign(logit=z) for k, z in seen.items() if k.startswith('test/')}
    if len(shapes) > 1:
        found['shapes.csv'] = stacked(shapes)
    if 'nih' in mine:
        found['other.csv'] = films_of(facts, 'nih_chestxray14').assign(
            split='test', logit=mine['nih']
        )
    return found


def folder_of(job):
    "Where a training's tables go"
    return Path(job['part']) / f"{job['data']}-{job['arch']}-{job['name']}" / f"seed{job['seed']}"


def write_tables(folders, out, parts=('seeds', 'distil', 'candidates', 'grid')):
    "Write the tables of all trainings of these parts; returns their folders"
    facts, logits = read(*folders)
    written = []
    for entry in facts['jobs']:
        if entry['job']['part'] not in parts:
            continue
        place = Path(out) / folder_of(entry['job'])
        for name, table in tables_of(facts, logits, entry).items():
            write_predictions(table, place / name)
        history = pd.DataFrame(entry['history'])
        with atomic_write(place / 'history.csv') as f:
            history.to_csv(f, index=False)
        about = {k: v for k, v in entry.items() if k != 'history'} | {
            k: facts.get(k) for k in ('versions', 'git', 'hardware', 'gpu')
        }
        with atomic_write(place / 'training.json') as f:
            f.write_text(to_json(about, indent=1) + "\n")
        written.append(place)
    return written


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('folders', type=Path, nargs='+')
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--parts', default='seeds,distil,candidates,grid')
    options = parser.parse_args(arguments)
    written = write_tables(options.folders, options.out, options.parts.split(','))
    print(f"{len(written)} trainings in {options.out}")


if __name__ == '__main__':
    main()
