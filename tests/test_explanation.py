"Heat maps: the same with and without torch, of one network and of several, and what a planted marker does to them"

import subprocess
import sys

import numpy as np
import pytest
import torch
from notebook_functions import functions_of
from pytorch_grad_cam import GradCAM
from torch.optim.swa_utils import update_bn

from cxr_study.data.cache import decoded
from cxr_study.data.images import Preprocess
from cxr_study.data.sets import load_dataset, phantom, sample_patients
from cxr_study.data.splits import make_split
from cxr_study.explain.attribution import (
    Inside,
    by_library,
    cam,
    explain,
    feature_maps,
    linear,
)
from cxr_study.predict.heat_map import colours, evidence, heat_map
from cxr_study.train.networks import Classifier, Ensemble, create_body
from cxr_study.train.recipe import Recipe
from cxr_study.train.training import Training, predict_logits, train


def awake(arch, spec, images, members=1):
    "An untrained model whose normalisation layers have seen the images"
    model = [Classifier(create_body(arch), spec) for _ in range(members)]
    for m in model:
        update_bn([torch.from_numpy(images)[:, None].float() / 255], m)
    return (Ensemble(model) if members > 1 else model[0]).eval()


def equal_to_gradcam(model, images):
    inside = Inside(model)
    z = inside.normalised(images)
    plain = cam(inside, z)
    assert plain.max() > 0.99 and np.abs(plain - by_library(GradCAM)(inside, z)).max() < 1e-4


@pytest.mark.parametrize('members', [1, 3])
@pytest.mark.parametrize('standardise', ['image', 'imagenet'])
def test_plain_map_is_gradcam(members, standardise):
    "Without gradients, from NumPy alone: within 1e-4 of Grad-CAM, and its cells add up to the logit"
    torch.manual_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (8, 96, 96), np.uint8)
    model = awake('test_resnet', Preprocess(size=96, standardise=standardise), images, members)
    equal_to_gradcam(model, images)
    inside = Inside(model)
    weights, bias = linear(inside)
    cells = evidence(feature_maps(inside, inside.normalised(images)), weights)
    assert np.allclose(cells.sum((1, 2)) + bias, predict_logits(model, images, range(8)), atol=1e-4)
    assert np.abs(heat_map(cells, 96) - explain(model, images)).max() < 1e-4
    assert np.abs(heat_map(cells[3], 96) - heat_map(cells, 96)[3]).max() < 1e-6


def test_plain_map_on_radiographs(data, monkeypatch):
    "The same on real radiographs, with the network of the headline run"
    torch.manual_seed(0)
    monkeypatch.setenv('CXR_DATA', str(data))
    few, spec = (
        sample_patients(load_dataset('chest_xray'), 8),
        Preprocess(size=160, standardise='image'),
    )
    images = np.stack([spec(few.source(i)) for i in range(8)])
    equal_to_gradcam(awake('tf_efficientnetv2_b0', spec, images), images)


def test_without_torch():
    "What the service needs for a heat map loads neither torch nor matplotlib"
    code = "import sys; from cxr_study.predict.heat_map import evidence, heat_map, overlay; assert not {'torch', 'matplotlib', 'captum', 'pytorch_grad_cam'} & set(sys.modules)"
    subprocess.run([sys.executable, '-c', code], check=True)


def test_colours():
    "Lightness rises evenly, so that no step looks like an edge"
    luminance = (colours(np.linspace(0, 1, 64)) / 255) ** 2.2 @ [0.2126, 0.7152, 0.0722]
    lightness = 116 * np.cbrt(luminance) - 16
    assert (np.diff(lightness) > 0).all() and np.diff(lightness).max() < 3 * np.diff(
        lightness
    ).mean()


def test_forgetting():
    "EigenCAM does not notice that the head forgot all; the plain map does, and forgetting leaves the original as it was"
    maps = functions_of('results/07_maps')
    torch.manual_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (8, 96, 96), np.uint8)
    inside = Inside(awake('test_resnet', Preprocess(size=96), images))
    before = explain(inside, images)
    other = maps.randomised(inside, 0, inside.normalised(images))
    assert (
        maps.similarity(explain(inside, images, 'EigenCAM'), explain(other, images, 'EigenCAM'))[
            'spearman'
        ].min()
        > 0.999
    )
    assert maps.similarity(before, explain(other, images))['spearman'].mean() < 0.9
    assert np.array_equal(before, explain(inside, images))


def test_planted_marker(tmp_path):
    "A network that learned with the marker turns with it, and its maps lie in the corners"
    lesions = functions_of('results/11_planted_lesions')
    spec, drawn = Preprocess(size=64, standardise='image'), phantom(images=200, pixels=64)
    images, index, _ = decoded(drawn, spec, tmp_path)
    table, _ = make_split(drawn, index.sha256)
    marked = lesions.planted(images, drawn.table.label)
    recipe = Recipe(epochs=6, batch_size=16, lr=5e-3, augment='none', precision='fp32')
    model, _ = train(
        Training('test_resnet', recipe=recipe),
        marked,
        table,
        spec,
        tmp_path / 'c.pt',
        say=str,
        device=torch.device('cpu'),
    )
    test = table[table.split == 'test']
    found = lesions.marker_test(
        model, images[test.row], test.label, test.patient_id, has_marker=True
    )
    assert found['inserted']['value'] >= 0.8 and found['removed']['value'] >= 0.8, found


def test_steady_map(monkeypatch):
    "Evidence that a network puts beside what it saw lies on it again after mirroring and shifting"
    lesions = functions_of('results/11_planted_lesions')
    images = np.zeros((1, 64, 64), np.uint8)
    images[0, 27:34, 17:24] = 200
    monkeypatch.setattr(
        lesions, 'explain', lambda model, x, method: lesions.moved((x > 0).astype(np.float32), 0, 2)
    )
    down, right = np.unravel_index(lesions.steady(None, images).argmax(), (64, 64))
    assert abs(down - 30) <= 1 and abs(right - 20) <= 1
