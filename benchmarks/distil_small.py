"""Five distillations at 64 px on a CPU: are their decisions less scattered than those of five plain seeds (H7)?

The GPU's time ended after one distillation at 224 px. This is the same code at a size that a CPU trains. Teachers are
three seeds each of ResNet-18 and EfficientNetV2-B0 (seeds 10 to 12), the plain seeds are those of the shape grid
(squashed, stretched, seeds 0 to 4). Networks meet Kaggle's test once, as it is (ANALYSIS_PLAN.md, section 9).
Nothing is chosen.

--out gets second_edition.json and seeds.npz, written anew after each training; a call that was killed goes on with
the next training.

usage: distil_small.py EARLIER --part teach|distil --out FOLDER [--work FOLDER]
       [--seeds 0,1,2,3,4] [--networks resnet18,...]
`distil` reads the teachers' second_edition.json of --taught. CXR_DATA has to hold chest_xray, chest_xray_matches.csv
and weights.
"""

import json
from pathlib import Path

from second_edition import Bench, Job
from shape_grid import begin, parser_of, train_missing

TEACHER_SEEDS = (10, 11, 12)
NETWORKS = dict(
    resnet18=dict(epochs=6),
    tf_efficientnetv2_b0=dict(epochs=6, weights='imagenet', lr=0.003),
)


class SmallBench(Bench):
    "The test as it is for distilled networks, none for teachers"

    def tests(self, job):
        return self.shapes(job, False) if job.part == 'distil' else {}


def teacher_jobs(networks):
    "Three seeds of each network"
    return [
        Job('teach', 'chest_xray', 'small', seed, arch=arch, size=64, **NETWORKS[arch])
        for arch in networks
        for seed in TEACHER_SEEDS
    ]


def distil_jobs(seeds, taught):  # Jobs of finished teachers
    "A ResNet-18 for each seed, taught by all teachers"
    teachers = tuple(
        dict(job=entry['job'], slope=entry['slope'], intercept=entry['intercept'])
        for entry in taught
    )
    return [
        Job('distil', 'chest_xray', 'small', seed, size=64, epochs=6, teachers=teachers)
        for seed in seeds
    ]


def main(arguments=None):
    parser = parser_of(__doc__)
    parser.add_argument('--part', choices=['teach', 'distil'], required=True)
    parser.add_argument('--taught', type=Path, nargs='*', default=[], help="folders of `teach`")
    parser.add_argument('--seeds', default='0,1,2,3,4')
    parser.add_argument('--networks', default=','.join(NETWORKS))
    options = parser.parse_args(arguments)
    bench, kept, _ = begin(options, SmallBench)
    if options.part == 'teach':
        jobs = teacher_jobs(options.networks.split(','))
    else:
        found = [json.loads((f / 'second_edition.json').read_text()) for f in options.taught]
        taught = [entry for facts in found for entry in facts['jobs']]
        jobs = distil_jobs([int(seed) for seed in options.seeds.split(',')], taught)
    finished = {entry['key'] for entry in kept.facts['jobs']}
    train_missing(bench, kept, [job for job in jobs if job.key not in finished])


if __name__ == '__main__':
    main()
