"""Trains the seeds of ANALYSIS_PLAN.md, section 6, that the GPU's time did not reach, on a CPU, one after the other.

Every network gets seeds until it has `--most` of them, with the code and the chosen recipe of second_edition.py. Each
meets its test and the other hospital once (section 7, looks 4 and 5). --out gets second_edition.json and seeds.npz,
written anew after each training; a call that was killed goes on with its last epoch. Weights lie in --work.

usage: more_seeds.py EARLIER [EARLIER ...] --out FOLDER [--work FOLDER] [--most 10] [--arch NAME] [--threads 2]
CXR_DATA has to hold chest_xray, chest_xray_matches.csv, pneumoniamnist, nih_chestxray14 and weights.
"""

from collections import Counter

from second_edition import Job, seed_jobs
from shape_grid import ResumingBench, begin, parser_of, train_missing


def missing_seeds(finished, chosen, most):  # Finished jobs; data set -> recipe; seeds a network
    "The trainings that bring every network to `most` seeds, the network with the fewest first"
    trained = {(job.data, job.arch, job.seed) for job in finished if job.part == 'seeds'}
    seeds = Counter((data, arch) for data, arch, _ in trained)
    wanted = [
        job
        for job in seed_jobs(chosen)
        if job.seed < most and (job.data, job.arch, job.seed) not in trained
    ]
    return sorted(wanted, key=lambda job: (job.seed, seeds[job.data, job.arch]))


def main(arguments=None):
    parser = parser_of(__doc__)
    parser.add_argument('--most', type=int, default=10, help="seeds of a network")
    parser.add_argument('--arch', default='', help="of this network alone")
    options = parser.parse_args(arguments)
    bench, kept, earlier = begin(options, ResumingBench, ('chest_xray', 'pneumoniamnist'))
    kept.facts['choice'] = earlier[0]['choice']
    chosen = {data: choice['chosen'] for data, choice in earlier[0]['choice'].items()}
    calls = [*earlier, kept.facts]
    finished = [Job(**entry['job']) for call in calls for entry in call['jobs']]
    missing = missing_seeds(finished, chosen, options.most)
    jobs = [job for job in missing if options.arch in ('', job.arch)]
    print(f"{len(jobs)} trainings are missing: {[job.key for job in jobs]}", flush=True)
    train_missing(bench, kept, jobs)


if __name__ == '__main__':
    main()
