"""One step of training with a small network of each family of timm, and its export.

usage: networks.py [NAME ...]
"""

import sys
import time
import warnings

import numpy as np
import timm
import torch

from cxr_study.core.options import OptionError
from cxr_study.data.images import Preprocess
from cxr_study.pipeline.export import run_onnx, to_onnx
from cxr_study.train.networks import Classifier, check_network, create_body

FAMILIES = (
    'resnet18',
    'efficientnet_b0',
    'convnext_atto',
    'regnety_002',
    'vit_tiny_patch16_224',
    'swin_tiny_patch4_window7_224',
    'mambaout_femto',
    'mixer_s32_224',
    'beit_base_patch16_224',
    'eva02_tiny_patch14_224',
    'xcit_nano_12_p16_224',
    'hiera_tiny_224',
    'levit_128s',
    'efficientformer_l1',
)


def step(arch: str) -> str:
    "What one step of training with this network gives, or why it is refused"
    facts = timm.get_pretrained_cfg(arch)
    size = facts.input_size[-1] if facts.fixed_input_size else 64
    start = time.time()
    try:
        check_network(arch, size)
    except OptionError as error:
        return f"refused: {error}"
    checked = time.time() - start
    model = Classifier(create_body(arch), Preprocess(size))
    x = torch.rand(2, 1, size, size)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(
        model(x)[:, 0], torch.tensor([0.0, 1.0])
    )
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    model.eval()
    maps = model.maps(x)
    head = model.head[-1]
    from_maps = maps.mean((2, 3)) @ head.weight[0] + head.bias
    assert torch.allclose(from_maps, model(x)[:, 0], atol=1e-4), arch
    shape = 'x'.join(map(str, maps.shape[1:]))
    return (
        f"works at {size}: map {shape}, loss {loss:.3f}, check {checked:.1f} s, "
        f"{len(without)} parameters without gradient"
    )


def difference(arch: str) -> float:
    "Largest difference of a logit between the exported network and the network, untrained, on noise"
    facts = timm.get_pretrained_cfg(arch)
    size = facts.input_size[-1] if facts.fixed_input_size else 64
    model = Classifier(create_body(arch), Preprocess(size)).eval()
    images = np.random.default_rng(0).integers(0, 256, (4, size, size)).astype(np.uint8)
    expected = model(torch.from_numpy(images)[:, None] / 255)[:, 0].detach().numpy()
    return float(np.abs(run_onnx(to_onnx(model), images)[:, 0] - expected).max())


if __name__ == '__main__':
    warnings.simplefilter('ignore')
    for name in sys.argv[1:] or FAMILIES:
        answer = step(name)
        if answer.startswith('works'):
            answer += f", exported with a difference of {difference(name):.1e}"
        print(f"{name:32} {answer}", flush=True)
