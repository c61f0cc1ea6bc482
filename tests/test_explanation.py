"Heat maps: the same with and without torch, of one network and of several, and their reaction to a planted marker"

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
    ExplainableModel,
    cam,
    explain,
    feature_maps,
    head_weights,
    library_cam,
)
from cxr_study.predict.heat_map import colours, evidence, heat_map
from cxr_study.train.networks import Classifier, Ensemble, create_body
from cxr_study.train.recipe import Recipe
from cxr_study.train.training import Training, TrainingData, predict_logits, train


def untrained(arch, spec, images, members=1):
    "An untrained model whose normalisation layers have measured the images"
    networks = [Classifier(create_body(arch), spec) for _ in range(members)]
    x = torch.from_numpy(images)[:, None].float() / 255
    for network in networks:
        update_bn([x], network)
    model = Ensemble(networks) if members > 1 else networks[0]
    return model.eval()


def check_equal_to_gradcam(model, images):
    "The plain map and Grad-CAM differ by less than 1e-4"
    inside = ExplainableModel(model)
    z = inside.normalised(images)
    plain = cam(inside, z)
    difference = plain - library_cam(inside, z, GradCAM)
    assert plain.max() > 0.99
    assert np.abs(difference).max() < 1e-4


@pytest.mark.parametrize('members', [1, 3])
@pytest.mark.parametrize('standardise', ['image', 'imagenet'])
def test_plain_map_is_gradcam(members, standardise):
    "Without gradients, from NumPy alone: within 1e-4 of Grad-CAM, and its cells add up to the logit"
    torch.manual_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (8, 96, 96), np.uint8)
    spec = Preprocess(size=96, standardise=standardise)
    model = untrained('test_resnet', spec, images, members)
    check_equal_to_gradcam(model, images)
    inside = ExplainableModel(model)
    weights, bias = head_weights(inside)
    cells = evidence(feature_maps(inside, inside.normalised(images)), weights)
    logits = predict_logits(model, images, range(8))
    assert np.allclose(cells.sum((1, 2)) + bias, logits, atol=1e-4)
    maps = heat_map(cells, 96)
    assert np.abs(maps - explain(model, images)).max() < 1e-4
    assert np.abs(maps[3] - heat_map(cells[3], 96)).max() < 1e-6


def test_plain_map_on_radiographs(data, monkeypatch):
    "The same on real radiographs, with the architecture of the headline run"
    torch.manual_seed(0)
    monkeypatch.setenv('CXR_DATA', str(data))
    few = sample_patients(load_dataset('chest_xray'), 8)
    spec = Preprocess(size=160, standardise='image')
    images = np.stack([spec(few.source(i)) for i in range(8)])
    check_equal_to_gradcam(untrained('tf_efficientnetv2_b0', spec, images), images)


def test_without_torch():
    "What the service needs for a heat map loads neither torch nor matplotlib"
    code = (
        "import sys; from cxr_study.predict.heat_map import evidence, heat_map, overlay; "
        "assert not {'torch', 'matplotlib', 'captum', 'pytorch_grad_cam'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, '-c', code], check=True)


def test_colours():
    "Lightness rises evenly, so that no step looks like an edge"
    linear_rgb = (colours(np.linspace(0, 1, 64)) / 255) ** 2.2
    luminance = linear_rgb @ [0.2126, 0.7152, 0.0722]
    lightness = 116 * np.cbrt(luminance) - 16
    steps = np.diff(lightness)
    assert (steps > 0).all()
    assert steps.max() < 3 * steps.mean()


def test_random_head():
    "EigenCAM does not change with a random head, the plain map does, and the original network stays as it was"
    maps = functions_of('results/07_maps')
    torch.manual_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (8, 96, 96), np.uint8)
    inside = ExplainableModel(untrained('test_resnet', Preprocess(size=96), images))
    plain = explain(inside, images)
    eigen = explain(inside, images, 'EigenCAM')
    other = maps.randomised(inside, 0, inside.normalised(images))
    likeness_of_eigen = maps.similarity(eigen, explain(other, images, 'EigenCAM'))
    likeness_of_plain = maps.similarity(plain, explain(other, images))
    assert likeness_of_eigen['spearman'].min() > 0.999
    assert likeness_of_plain['spearman'].mean() < 0.9
    assert np.array_equal(plain, explain(inside, images))


def test_planted_marker(tmp_path):
    "A network trained with the marker changes its answers with it"
    lesions = functions_of('results/11_planted_lesions')
    spec = Preprocess(size=64, standardise='image')
    phantoms = phantom(images=200, pixels=64)
    images, index, _ = decoded(phantoms, spec, tmp_path)
    table, _ = make_split(phantoms, index.sha256)
    marked = lesions.planted(images, phantoms.table.label)
    recipe = Recipe(epochs=6, batch_size=16, lr=5e-3, augment='none', precision='fp32')
    training = Training('test_resnet', recipe=recipe)
    data = TrainingData(marked, table, spec)
    model, _ = train(training, data, tmp_path / 'c.pt', say=str, device=torch.device('cpu'))
    test = table[table.split == 'test']
    found = lesions.marker_test(
        model, images[test.row], test.label, test.patient_id, has_marker=True
    )
    assert found['inserted']['value'] >= 0.8, found
    assert found['removed']['value'] >= 0.8, found


def test_steady_map(monkeypatch):
    "A map that is always shifted to one side is back on the object after averaging over mirrored and shifted copies"
    lesions = functions_of('results/11_planted_lesions')
    images = np.zeros((1, 64, 64), np.uint8)
    images[0, 27:34, 17:24] = 200

    def shifted_map(model, x, method):
        return lesions.moved((x > 0).astype(np.float32), 0, 2)

    monkeypatch.setattr(lesions, 'explain', shifted_map)
    down, right = np.unravel_index(lesions.steady(None, images).argmax(), (64, 64))
    assert abs(down - 30) <= 1
    assert abs(right - 20) <= 1
