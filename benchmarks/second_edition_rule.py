"""The rule of ANALYSIS_PLAN.md, section 5: criterion C of a training, and the choice among candidates."""

import math

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression

SENSITIVITY = 0.97  # At which wide normals are read
SPARE = 0.01  # Differences of that specificity that count as none
NEAR = 0.002  # Validation AUC that a distilled network may lose


def group_weights(table):  # `label` and `wide`
    "Weights with mean 1 that give each of the four groups the same total; absent groups are passed over"
    size = table.groupby(['label', 'wide']).label.transform('size').to_numpy(float)
    return len(table) / (size * len(table.groupby(['label', 'wide'])))


def platt_line(z, table, weights=None):  # Version -> logits [n]
    "(slope, intercept) fitted on all versions"
    x, y = np.concatenate(list(z.values())), np.tile(table.label, len(z))
    weights = None if weights is None else np.tile(weights, len(z))
    found = LogisticRegression(C=1e6, max_iter=1000).fit(x[:, None].astype(float), y, weights)
    return float(found.coef_[0, 0]), float(found.intercept_[0])


def criterion(z, table):  # Version -> logits [n]; the validation films
    "Each film's part [n] of criterion C: its mean is C"
    weights = group_weights(table)
    slope, intercept = platt_line(z, table, weights)
    sign = np.where(table.label == 1, -1, 1)
    loss = np.mean(
        [np.logaddexp(0, sign * (slope * v.astype(float) + intercept)) for v in z.values()], 0
    )
    return weights * loss


def wide_specificity(logit, table):  # Plain logits [n]
    "Share of wide normals below the threshold that gives the plan's sensitivity"
    sick, wide = (
        logit[table.label.to_numpy() == 1],
        logit[((table.label == 0) & table.wide).to_numpy()],
    )
    threshold = np.sort(sick)[math.floor((1 - SENSITIVITY) * len(sick))]
    return float((wide < threshold).mean()) if len(wide) else math.nan


def standard_error(parts, children):  # Differences [n] a training, and the child of each film
    "The larger of the standard errors over trainings and over children"
    means = np.array([p.mean() for p in parts])
    over_trainings = means.std(ddof=1) / len(means) ** 0.5 if len(means) > 1 else 0.0
    n = sum(map(len, parts))
    sums = [
        pd.Series(p - p.mean()).groupby(np.asarray(c)).sum().to_numpy()
        for p, c in zip(parts, children)
    ]
    return max(float(over_trainings), float(np.sqrt((np.concatenate(sums) ** 2).sum()) / n))


def choose(found, names):
    """(name of the recipe, a row a candidate) by the plan's rule

    `found`: (name, fold) -> dict(parts [n], children [n], wide_specificity, valid_auc); `names`: simple to complex"""
    folds = sorted({f for _, f in found if all((n, f) in found for n in names)})
    if not folds:
        return names[0], []
    mean = {n: float(np.mean([found[n, f]['parts'].mean() for f in folds])) for n in names}
    best, rows = min(names, key=mean.get), []
    for n in names:
        parts = [found[n, f]['parts'] - found[best, f]['parts'] for f in folds]
        rows.append(
            dict(
                candidate=n,
                folds=folds,
                criterion=mean[n],
                excess=mean[n] - mean[best],
                error=standard_error(parts, [found[n, f]['children'] for f in folds]),
                wide_specificity=float(np.mean([found[n, f]['wide_specificity'] for f in folds])),
                valid_auc=float(np.mean([found[n, f]['valid_auc'] for f in folds])),
            )
        )
    ties = [r for r in rows if r['excess'] <= r['error']]
    found_well = {
        r['candidate']: np.nan_to_num(r['wide_specificity']) for r in ties
    }  # NaN: no wide normals
    chosen = next(n for n, share in found_well.items() if share >= max(found_well.values()) - SPARE)
    return chosen, [r | dict(tie=r in ties, chosen=r['candidate'] == chosen) for r in rows]
