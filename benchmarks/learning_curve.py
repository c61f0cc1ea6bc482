"""Trains on a part of the training children: how much would more films help? Validation alone; no test is opened.

The networks are those of the shape grid (ResNet-18, 64 px, squashed, stretched), whose five seeds are the curve's last
point. A seed draws its children anew; its smaller sets lie in its larger ones. Fewer films are seen in more epochs.
--out gets second_edition.json and seeds.npz, written anew after each training. A call that was killed goes on with
its last epoch.

usage: learning_curve.py EARLIER --out FOLDER [--threads 2] [--seeds 0,1,2,3,4]
CXR_DATA has to hold chest_xray and chest_xray_matches.csv.
"""

import numpy as np
from second_edition import Job, training_pixels, training_table
from shape_grid import ResumingBench, begin, parser_of, train_missing

PARTS = {0.1: 24, 0.25: 12, 0.5: 9}  # Part of the children -> epochs; all of them: 6, in the grid


def curve_jobs(seeds):
    "The trainings, the cheapest parts first within a seed"
    return [
        Job(
            'curve',
            'chest_xray',
            f'part_{part:g}',
            seed,
            geometry='squash',
            augment='stretch',
            size=64,
            epochs=epochs,
        )
        for seed in seeds
        for part, epochs in PARTS.items()
    ]


def part_of(job):
    "The part of the children that a training sees"
    return float(job.name.removeprefix('part_'))


def drawn_children(table, part, seed):  # `split` and `patient_id`
    "The training children of a part; a smaller part of the same seed lies in a larger one"
    children = np.sort(table.patient_id[table.split == 'train'].unique())
    order = np.random.default_rng(seed).permutation(len(children))
    return children[order[: max(1, round(part * len(children)))]]


def drawn(table, job):
    "The table with the training films of the drawn children alone"
    children = drawn_children(table, part_of(job), job.seed)
    kept = (table.split != 'train') | table.patient_id.isin(children)
    return table[kept].reset_index(drop=True)


class CurveBench(ResumingBench):
    "Trains on a part of the children; opens no test"

    def tests(self, job):
        return {}

    def fit(self, training, job, pixels, table):
        return super().fit(training, job, pixels, drawn(table, job))

    def train(self, job):
        logits, facts = super().train(job)
        images = len(training_pixels_of(self, job))
        table, _ = training_table(self.films(job.data), job, images)
        seen = drawn(table, job).query("split == 'train'")
        self.path(job).unlink()
        return logits, facts | dict(films=len(seen), children=seen.patient_id.nunique())


def training_pixels_of(bench, job):
    "The pixels that the bench remembers for this training"
    kind = ('training', job.data, job.size, job.geometry, job.fold, job.overlay)
    return bench.remembered(kind, lambda: training_pixels(bench.films(job.data), job))[0]


def main(arguments=None):
    parser = parser_of(__doc__)
    parser.add_argument('--seeds', default='0,1,2,3,4')
    options = parser.parse_args(arguments)
    bench, kept, _ = begin(options, CurveBench)
    finished = {entry['key'] for entry in kept.facts['jobs']}
    jobs = curve_jobs([int(seed) for seed in options.seeds.split(',')])
    train_missing(bench, kept, [job for job in jobs if job.key not in finished])


if __name__ == '__main__':
    main()
