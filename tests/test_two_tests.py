"""What the two tests hold: the functions of benchmarks/two_tests.py, and its committed tables."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw, ImageFont
from two_tests import SIDE, compared, neighbours, writing

from cxr_study.core.run import root
from cxr_study.data.images import resize
from cxr_study.data.match import test_part as part_of_test
from cxr_study.data.sets import phantom

FOLDER = root() / 'results/two_tests'


def marked(film, words, place):
    "The film with a bright text"
    picture = Image.fromarray(film)
    font = ImageFont.load_default(size=10)
    ImageDraw.Draw(picture).text(place, words, fill=255, font=font)
    return np.asarray(picture)


@pytest.mark.parametrize("place, is_counted", [((6, 6), True), ((50, 50), False)])
def test_writing_is_found_near_the_border_alone(place, is_counted):
    film = np.minimum(resize(phantom(images=2).source(0), SIDE), 150).astype(np.uint8)
    before, area = writing(film)
    after, larger = writing(marked(film, "R", place))
    assert (after > before and larger > area) == is_counted


def test_long_edges_near_the_border_are_not_writing():
    "Ribs and skin are light and narrow as well, but long"
    film = np.minimum(resize(phantom(images=2).source(0), SIDE), 150).astype(np.uint8)
    edged = film.copy()
    edged[30:90, 5:7] = 255
    assert writing(edged) == writing(film)


def test_a_feature_that_differs_is_told_from_one_that_does_not():
    rng = np.random.default_rng(0)
    films = pd.DataFrame(
        dict(
            patient_id=np.arange(200) // 2,
            set=np.repeat(['common', 'other normals'], 100),
            same=rng.normal(size=200),
            other=rng.normal(size=200) + np.repeat([0, 2], 100),
        )
    )
    same = compared(films, 'same', 'common', 'other normals', 100)
    other = compared(films, 'other', 'common', 'other normals', 100)
    assert same['lower'] < 0.5 < same['upper']
    assert other['lower'] > 0.8


def test_neighbours_are_of_other_children():
    rng = np.random.default_rng(0)
    films = rng.integers(0, 255, (120, 28, 28)).astype(np.uint8)
    films[60:] = films[:60]  # Each film has a copy, of the same child and with the other label
    labels = np.repeat([0, 1], 60)
    children = np.tile(np.arange(60), 2)
    shares = neighbours(films, np.ones(120, bool), labels, children)
    assert abs(shares.mean() - 0.5) < 0.1 and (shares >= 0).all()


def test_the_committed_tables_are_of_the_parts_of_the_tests():
    films = pd.read_csv(FOLDER / 'films.csv', keep_default_na=False)
    normal = films[films.label == 0]
    assert list(normal.set) == list(part_of_test(normal.image_id))
    assert films.groupby('data').size().to_dict() == dict(chest_xray=624, pneumoniamnist=624)
    greedy = pd.read_csv(FOLDER / 'greedy.csv', keep_default_na=False)
    assert (greedy.reason != '').all() and greedy.file.is_unique
    native = pd.read_csv(FOLDER / 'native.csv')
    assert (native.image_id == native.squashed_image_id).all()
