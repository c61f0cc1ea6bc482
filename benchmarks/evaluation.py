"""How long 10,000 bootstrap replicates of every metric take, beside a loop of scikit-learn calls over the very same
replicates, in one run; or how long `cxr-study evaluate` takes at the size of NIH ChestX-ray14, a quarter and a
sixteenth of it, and for all published runs.

usage: python benchmarks/evaluation.py [REPLICATES]   (default 10000; the loop takes minutes)
       python benchmarks/evaluation.py command OUT.json
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn import metrics as sk
from sklearn.isotonic import IsotonicRegression

from cxr_study.core.run import hardware
from cxr_study.evaluate.intervals import bootstrap, bootstrap_weights
from cxr_study.evaluate.metrics import scored, simulate
from cxr_study.predict.decision import sigmoid


def by_sklearn(y, z, p, w):
    "Every metric of `evaluate.metrics` by scikit-learn, with sample weights"
    d = z >= 0
    iso, base = IsotonicRegression().fit(z, y, sample_weight=w).predict(z), np.average(y, weights=w)
    brier = [np.average((q - y) ** 2, weights=w) for q in (iso, base)]
    return [
        sk.recall_score(y, d, sample_weight=w),
        sk.recall_score(y, d, pos_label=0, sample_weight=w),
        sk.precision_score(y, d, sample_weight=w),
        sk.precision_score(y, d, pos_label=0, sample_weight=w),
        sk.accuracy_score(y, d, sample_weight=w),
        sk.balanced_accuracy_score(y, d, sample_weight=w),
        sk.f1_score(y, d, sample_weight=w),
        sk.f1_score(y, d, pos_label=0, sample_weight=w),
        sk.matthews_corrcoef(y, d, sample_weight=w),
        *sk.class_likelihood_ratios(y, d, sample_weight=w),
        sk.roc_auc_score(y, z, sample_weight=w),
        sk.roc_auc_score(y, z, max_fpr=0.1, sample_weight=w),
        sk.average_precision_score(y, z, sample_weight=w),
        sk.log_loss(y, p, sample_weight=w),
        sk.brier_score_loss(y, p, sample_weight=w),
        brier[0],
        brier[1],
    ]


def main(replicates=10_000):
    table = simulate(patients=431, images=1.45, seed=4)
    s = scored(table)
    bootstrap(s, replicates=10)  # imports
    start = time.perf_counter()
    ours = bootstrap(s, replicates=replicates)
    fast = time.perf_counter() - start
    y, p, weights = s.label.astype(int), sigmoid(s.logit), bootstrap_weights(s, replicates, 0)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        auc = np.array([by_sklearn(y, s.logit, p, w)[11] for block in weights for w in block])
    slow = time.perf_counter() - start
    print(
        json.dumps(
            dict(
                images=len(y),
                patients=int(s.patients),
                metrics=len(ours),
                replicates=replicates,
                vectorised_s=round(fast, 2),
                sklearn_loop_s=round(slow, 1),
                times_faster=round(slow / fast),
                largest_auc_difference=float(np.abs(auc - ours['auc']).max()),
            )
        )
    )


NIH = (112_120, 30_805)  # Images, patients
PARTS = (16, 4, 1)  # Of these
REPEATS = 5


def drawn(images, patients):
    "A table of predictions with an image of each patient, and others of patients drawn at random"
    rng = np.random.default_rng(0)
    patient = np.r_[np.arange(patients), rng.integers(0, patients, images - patients)]
    label = (rng.random(images) < 0.1).astype(int)
    logit = 1.5 * label - 2 + rng.normal(size=images)
    return pd.DataFrame(
        dict(image_id=range(images), patient_id=patient, label=label, probability=sigmoid(logit))
    )


def once(path, out):
    "(wall seconds, processor seconds, largest memory in MB) of `cxr-study evaluate`, in a process of its own"
    code = 'import sys; from cxr_study.cli import main; sys.argv[0] = "cxr-study"; main()'
    start = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    arguments = ['evaluate', str(path), '--out', str(out)]
    process = subprocess.Popen(
        [sys.executable, '-c', code, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, path
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = time.perf_counter() - start
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, cpu, used.ru_maxrss / 1024


def medians(path):
    "Medians of several evaluations"
    with tempfile.TemporaryDirectory() as out:
        found = [once(path, out) for _ in range(REPEATS)]
    wall, cpu, memory = (statistics.median(values) for values in zip(*found))
    return dict(wall_s=round(wall, 1), cpu_s=round(cpu, 1), memory_mb=round(memory))


def command(out):
    "Write the times of the command"
    result = dict(hardware=hardware(), repeats=REPEATS, load_average=os.getloadavg(), sizes=[])
    images, patients = NIH
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            path = Path(folder) / 'table.csv'
            drawn(images // part, patients // part).to_csv(path, index=False)
            size = dict(images=images // part, patients=patients // part)
            result['sizes'].append(size | medians(path))
    runs = len(list(Path('results').glob('**/predictions.csv')))
    result['results'] = dict(runs=runs) | medians('results')
    print(json.dumps(result))
    Path(out).write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    if sys.argv[1:2] == ['command']:
        command(sys.argv[2])
    else:
        main(*map(int, sys.argv[1:]))
