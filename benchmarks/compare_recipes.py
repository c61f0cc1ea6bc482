"""Recipes compared on validation patients under stress, over seeds: trains what results/*.csv do not hold yet.

    python benchmarks/compare_recipes.py recipes|shapes|crops|rates

The test set is never decoded into a training or a figure here. `nbs/results/04_recipes` shows what came out."""

import argparse
import dataclasses
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import t as student
from sklearn.metrics import log_loss, roc_auc_score

from cxr_study.core.run import atomic_write, root, to_json
from cxr_study.data.cache import decoded
from cxr_study.data.images import Preprocess
from cxr_study.data.sets import load_dataset
from cxr_study.data.splits import make_split
from cxr_study.predict.decision import sigmoid
from cxr_study.train.loaders import STRESS, STRETCHED, stress_tables
from cxr_study.train.recipe import Recipe
from cxr_study.train.training import Training, TrainingData, predict_logits, train

MEASURES = dict(stress_loss="loss under stress", shift_loss="loss under stress and in other shapes")
REST = (
    "plain_loss",
    "plain_auc",
    "stress_loss",
    "stress_auc",
    "worst_loss",
    "shape_loss",
    "shape_auc",
    "images_per_second",
)


# --- What is measured, and a cell of the comparison


def stressed(model, images: np.ndarray, table: pd.DataFrame) -> pd.DataFrame:
    """Log loss and AUC of the validation images, a row a change.

    Rows are each change of `STRESS`, `all` of these, and each change of `STRETCHED`. `images` is uint8 [N, H, W];
    `table` has a row an image, of which only those of `val` are looked at."""
    val = table[table.split == "val"]
    plain = images[val.row.to_numpy()]

    def logits(x):
        return predict_logits(model, x, np.arange(len(val)))

    def row(name, z, label):
        return dict(change=name, loss=log_loss(label, sigmoid(z)), auc=roc_auc_score(label, z))

    exposed = {name: logits(change[plain]) for name, change in zip(STRESS, stress_tables())}
    reshaped = {name: logits(change(plain)) for name, change in STRETCHED.items()}
    everything = row(
        "all", np.concatenate(list(exposed.values())), np.tile(val.label, len(exposed))
    )
    first, last = ([row(*item, val.label) for item in part.items()] for part in (exposed, reshaped))
    return pd.DataFrame([*first, everything, *last]).set_index("change")


@dataclasses.dataclass(frozen=True)
class Cell:
    "One recipe to compare: a training, and the preprocessing of its images"

    name: str
    training: Training
    spec: Preprocess

    def differing(self, **changes) -> "Cell":
        "This cell with other values of `Training`, `Preprocess` or `Recipe`; its name says which"

        def mine(part):
            return {k: v for k, v in changes.items() if k in part.__dataclass_fields__}

        recipe = dataclasses.replace(self.training.recipe, **mine(self.training.recipe))
        training = dataclasses.replace(self.training, recipe=recipe, **mine(self.training))
        name = ", ".join(f"{k} {v}" for k, v in changes.items())
        return Cell(name, training, dataclasses.replace(self.spec, **mine(self.spec)))


def run_cell(cell: Cell, seed: int, source, checkpoint: Path, device=None) -> dict:
    """A row of the comparison: what the cell's network of this seed gives on validation patients.

    `source` gives (images, table) for a `Preprocess`."""
    images, table = source(cell.spec)
    training = dataclasses.replace(cell.training, seed=seed)
    started = time.time()
    data = TrainingData(images, table[table.split != "test"], cell.spec)
    model, history = train(training, data, checkpoint, str, device)
    seconds = time.time() - started
    checkpoint.unlink()
    found = stressed(model, images, table)
    exposed, reshaped = found.loc[list(STRESS)], found.loc[list(STRETCHED)]
    return dict(
        cell=cell.name,
        seed=seed,
        stress_loss=found.loss["all"],
        plain_loss=found.loss["plain"],
        plain_auc=found.auc["plain"],
        stress_auc=found.auc["all"],
        worst_loss=exposed.loss.max(),
        shape_loss=reshaped.loss.mean(),
        shape_auc=reshaped.auc.mean(),
        shift_loss=pd.concat([exposed, reshaped]).loss.mean(),
        seconds=round(seconds, 1),
        images_per_second=history.images_per_second.median(),
    )


SAID = (
    "{cell}, seed {seed}: stress loss {stress_loss:.4f}, plain AUC {plain_auc:.4f}, {seconds:.0f} s"
)


def compare(
    cells, seeds, source, file: Path, say=partial(print, file=sys.stderr), device=None
) -> pd.DataFrame:
    "`run_cell` over cells and seeds; `file` (csv) grows by a row a training, and what it holds is not trained again"
    rows = pd.read_csv(file).to_dict("records") if Path(file).is_file() else []
    for seed in seeds:
        for cell in cells:
            if any(r["cell"] == cell.name and r["seed"] == seed for r in rows):
                continue
            rows.append(run_cell(cell, seed, source, Path(file).with_name("checkpoint.pt"), device))
            with atomic_write(file) as temporary:
                pd.DataFrame(rows).to_csv(temporary, index=False)
            say(SAID.format(**rows[-1]))
    names = [cell.name for cell in cells]
    return pd.DataFrame([r for r in rows if r["cell"] in names])


# --- What a comparison says


def mean_interval(x) -> tuple[float, float, float]:
    "Mean of numbers, one a seed, with lower and upper 95 % bound by Student's t"
    x = np.asarray(x, float)
    half = student.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5 if len(x) > 1 else np.nan
    return x.mean(), x.mean() - half, x.mean() + half


def ranking(
    results: pd.DataFrame, base: str = "base", measure: str = "stress_loss"
) -> pd.DataFrame:
    "A row a cell, best first: mean with interval over seeds, and the difference from `base`, paired by seed"
    wide = results.pivot(index="seed", columns="cell", values=measure)
    rows = []
    for cell in wide:
        mean, lower, upper = mean_interval(wide[cell])
        difference, difference_lower, difference_upper = mean_interval(
            (wide[cell] - wide[base]).dropna()
        )
        rest = results.loc[results.cell == cell, [c for c in REST if c in results]].mean()
        rows.append(
            dict(
                cell=cell,
                seeds=wide[cell].count(),
                mean=mean,
                lower=lower,
                upper=upper,
                difference=difference,
                difference_lower=difference_lower,
                difference_upper=difference_upper,
                **rest,
            )
        )
    return pd.DataFrame(rows).sort_values("mean", ignore_index=True)


def choice(results: pd.DataFrame, file: Path, measure: str = "stress_loss") -> str:
    "Write the ranking and the cell with the lowest mean of the measure as JSON; returns that cell's name"
    order = ranking(results, measure=measure)
    chosen = dict(
        measure=measure, split="val", chosen=order.cell[0], cells=order.to_dict("records")
    )
    with atomic_write(file) as temporary:
        temporary.write_text(to_json(chosen))
    return order.cell[0]


# --- The comparisons


def some_patients(table: pd.DataFrame, images: int, seed: int = 0) -> pd.DataFrame:
    "`table` without the test and with whole patients of train, drawn at random until they have about `images` images"
    train_rows = table[table.split == "train"]
    patients = np.random.default_rng(seed).permutation(train_rows.patient_id.unique())
    enough = train_rows.patient_id.value_counts()[patients].cumsum() <= images
    kept = (table.split == "train") & table.patient_id.isin(enough.index[enough])
    return table[(table.split == "val") | kept].reset_index(drop=True)


def real_images(
    spec: Preprocess, images: int = 1500, dataset: str = "chest_xray"
) -> tuple[np.ndarray, pd.DataFrame]:
    "(pixels, table) of a data set at hand, decoded for `spec`: some patients of train, all of val, none of the test"
    source = load_dataset(dataset)
    pixels, index, _ = decoded(source, spec)
    return pixels, some_patients(make_split(source, index.sha256)[0], images)


def one_at_a_time() -> list[Cell]:
    "A ResNet-18 from scratch at 64 pixels and three epochs, and cells that differ from it in one choice each"
    base = Cell("base", Training("resnet18", "none", Recipe(epochs=3)), Preprocess(size=64))
    changes = [
        dict(arch="tf_efficientnetv2_b0", weights="none"),
        dict(arch="tf_efficientnetv2_b0", weights="imagenet"),
        dict(size=96),
        dict(standardise="image"),
        *(dict(augment=name) for name in ("none", "exposure", "equalise", "shift")),
        dict(loss="weighted"),
        dict(loss="focal"),
        dict(smoothing=0.1),
        dict(sampling="balanced"),
        dict(mix="mixup"),
        dict(ema=0.95),
    ]
    return [base, *(base.differing(**change) for change in changes)]


def together(cells: list[Cell], order: pd.DataFrame) -> Cell:
    """A cell with the best change of each kind, of those that were better than the base.

    `cells` differ in one change each, `order` is their `ranking`; network, weights and size stay."""
    base = next(cell for cell in cells if cell.name == "base")
    changes = {}
    for name in order[order.difference < 0].cell:
        kind, _, value = name.partition(" ")
        if "," not in name and kind not in ("arch", "weights", "size"):
            part = base.training.recipe if hasattr(base.training.recipe, kind) else base.spec
            changes.setdefault(kind, type(getattr(part, kind))(value))
    return base.differing(**changes) if changes else base


def of_shape() -> list[Cell]:
    "The recipe of the first comparison as the base, the same with stretching, and stretched at a larger size"
    recipe = Recipe(epochs=3, augment="equalise")
    base = Cell(
        "base", Training("resnet18", "none", recipe), Preprocess(size=64, standardise="image")
    )
    return [base, base.differing(augment="stretch"), base.differing(augment="stretch", size=96)]


def of_crops() -> list[Cell]:
    "The recipe of the first comparison at twelve epochs as the base, and the same with stretching"
    base = dataclasses.replace(of_shape()[0].differing(epochs=12), name="base")
    return [base, base.differing(augment="stretch")]


def of_rate() -> list[Cell]:
    "An EfficientNet from ImageNet with stretching at the default learning rate, as the base, and at three times that"
    recipe = Recipe(epochs=3, augment="stretch")
    base = Cell(
        "base",
        Training("tf_efficientnetv2_b0", "imagenet", recipe),
        Preprocess(size=96, standardise="image"),
    )
    return [base, base.differing(lr=0.003)]


def compare_recipes(file: Path) -> None:
    "Each change alone, then the changes that were better than the base together"
    cells = one_at_a_time()
    results = compare(cells, range(3), real_images, file)
    final = compare([cells[0], together(cells, ranking(results))], range(3), real_images, file)
    choice(pd.concat([results, final]).drop_duplicates(["cell", "seed"]), file.with_suffix(".json"))


def compare_shapes(file: Path) -> None:
    choice(
        compare(of_shape(), range(3), real_images, file), file.with_suffix(".json"), "shift_loss"
    )


def compare_crops(file: Path) -> None:
    source = partial(real_images, images=10**6, dataset="pneumoniamnist")
    choice(compare(of_crops(), range(2), source, file), file.with_suffix(".json"), "shift_loss")


def compare_rates(file: Path) -> None:
    compare(of_rate(), [0], partial(real_images, images=10**6), file)


COMPARISONS = dict(
    recipes=compare_recipes, shapes=compare_shapes, crops=compare_crops, rates=compare_rates
)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comparison", choices=COMPARISONS)
    name = parser.parse_args().comparison
    COMPARISONS[name](root() / f"results/{name}.csv")
