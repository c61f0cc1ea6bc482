"""How long 10,000 bootstrap replicates of every metric take, beside a loop of scikit-learn calls over the very same
replicates, in one run.

usage: python benchmarks/evaluation.py [REPLICATES]   (default 10000; the loop takes minutes)
"""

import json
import sys
import time
import warnings

import numpy as np
from sklearn import metrics as sk
from sklearn.isotonic import IsotonicRegression

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


if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
