"""Trains the seeds of the shape grid that earlier calls of second_edition.py did not finish, one after the other.

It runs the same code as the GPU's calls: `Bench.train` of second_edition.py. --out gets second_edition.json and
search.npz in their form, written anew after each training; a call that was killed goes on with its last epoch.
The films have to be those of the earlier calls. Nothing is chosen here (ANALYSIS_PLAN.md, section 7, look 2).

usage: shape_grid.py EARLIER [EARLIER ...] --out FOLDER [--threads 2] [--most 0]
CXR_DATA has to hold chest_xray and chest_xray_matches.csv.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from second_edition import Bench, Kept, finite, grid_jobs, line_of

from cxr_study.core.run import StudyError, to_json
from cxr_study.data.images import Preprocess
from cxr_study.train.training import TrainingData, train


class ResumingBench(Bench):
    "As `Bench`; a training that was killed goes on from its checkpoint"

    def fit(self, training, job, pixels, table):
        checkpoint = self.folder / f'{job.key}.pt'
        data = TrainingData(pixels, table, Preprocess(job.size, standardise='image'))
        found = train(training, data, checkpoint, say, self.device)
        checkpoint.unlink(missing_ok=True)
        return found


def say(line):
    print(line, flush=True)


class Resumed(Kept):
    "What is finished, with what a killed call left in the same folder"

    def __init__(self, out, folder, options):
        super().__init__(out, folder, options)
        path = self.out / 'second_edition.json'
        if not path.exists():
            return
        before = json.loads(path.read_text())
        self.facts['jobs'] = before['jobs']
        self.facts['failed'] = before['failed']
        keys = {entry['key'] for entry in before['jobs']}
        for place, logits in self.logits.items():
            path = self.out / f'{place}.npz'
            stored = np.load(path) if path.exists() else {}
            logits |= {name: stored[name] for name in stored if name.split('/')[0] in keys}


def missing_jobs(finished):  # Keys of finished trainings
    "The trainings of the grid that are not finished, in the plan's order"
    return [job for job in grid_jobs() if job.key not in finished]


def check_films(
    table, earlier, data='chest_xray'
):  # From `Films.table`; `films` of an earlier call
    "Raise a `StudyError` unless the films and their split are those of the earlier call"
    mine = json.loads(to_json(finite(table.drop(columns='row').to_dict('list'))))
    if mine != earlier[data]:
        changed = [name for name in mine if mine[name] != earlier[data].get(name)]
        raise StudyError(
            f"The films of {data} in CXR_DATA differ from those of the earlier call in {', '.join(changed)}. "
            "Use the data of that call."
        )


def train_missing(bench, kept, jobs):
    "Train each job and keep its logits"
    for job in jobs:
        logits, facts = bench.run(job)
        kept.add(job, logits, facts)
        seconds = time.time() - kept.started
        print(f"[{seconds:6.0f} s] {job.key} {line_of(logits, facts)}", flush=True)


def parser_of(text):  # A script's docstring
    "The arguments that the scripts which train on a CPU share"
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('earlier', type=Path, nargs='+', help="folders of second_edition.py")
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--work', type=Path, help="decoded films, weights; default: OUT/work")
    parser.add_argument('--threads', type=int, default=2)
    return parser


def begin(options, bench_class, data_sets=('chest_xray',)):  # From `parser_of`
    "(bench, what is kept, facts of the earlier calls); the films have to be those of the earlier calls"
    earlier = [json.loads((f / 'second_edition.json').read_text()) for f in options.earlier]
    folder = options.work or options.out / 'work'
    for made in (options.out, folder):
        made.mkdir(parents=True, exist_ok=True)
    os.environ['CXR_CACHE'] = str(folder / 'cache')
    torch.set_num_threads(options.threads)
    kept = Resumed(options.out, folder, {k: str(v) for k, v in vars(options).items()})
    bench = bench_class(folder, limit=0, tiny=False)
    for data in data_sets:
        check_films(bench.films(data).table(), earlier[0]['films'], data)
    kept.facts['films'] = earlier[0]['films']
    return bench, kept, earlier


def main(arguments=None):
    parser = parser_of(__doc__)
    parser.add_argument('--most', type=int, default=0, help="trainings in this call; 0: all")
    options = parser.parse_args(arguments)
    bench, kept, earlier = begin(options, ResumingBench)
    finished = {entry['key'] for call in [*earlier, kept.facts] for entry in call['jobs']}
    jobs = missing_jobs(finished)
    print(f"{len(jobs)} trainings are missing", flush=True)
    train_missing(bench, kept, jobs[: options.most or None])


if __name__ == '__main__':
    main()
