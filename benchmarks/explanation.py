"""Speed of the plain heat maps and of the corruptions on this machine.

  maps         a thousand plain class activation maps of ResNet-18 at 224 px, from uint8 images to finished maps;
               under a minute on two cores is asked.
               `bf16`: the same under bfloat16, with the largest difference from the maps in 32 bits
  corruptions  624 images of 224 px at all 65 settings; under five minutes is asked

usage: explanation.py [PART ...] [--out results/benchmarks/explanation.json]
"""

import argparse
import json
import os
import platform
import time
import warnings
from pathlib import Path

warnings.filterwarnings('ignore')
import numpy as np
import torch

from cxr_study.core.run import atomic_write, hardware, to_json
from cxr_study.data.images import Preprocess
from cxr_study.data.sets import phantom
from cxr_study.explain.attribution import ExplainableModel, explain, timed_maps
from cxr_study.robust.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from cxr_study.train.networks import Classifier, create_body
from cxr_study.train.recipe import bf16_pays


def films(n, pixels=224):
    "uint8 [n, pixels, pixels] of drawn thoraxes"
    drawn = phantom(images=40, pixels=pixels)
    return np.stack([drawn.source(i % 40) for i in range(n)])


def maps():
    "fp32 and bf16 maps in one process; how far apart they are on drawn thoraxes"
    found, few = dict(fp32=timed_maps()), films(32)
    torch.manual_seed(0)
    inside = ExplainableModel(Classifier(create_body('resnet18'), Preprocess(size=224)))
    plain = explain(inside, few)
    with torch.autocast('cpu', torch.bfloat16):
        found['bf16'] = timed_maps() | dict(
            chosen_by_auto=bf16_pays(inside, torch.device('cpu')),
            largest_difference=float(abs(explain(inside, few) - plain).max()),
        )
    return found


def corruptions(n=624):
    "Seconds for all settings, and for each corruption"
    images, each = films(n), {}
    for name in CORRUPTIONS:
        began = time.perf_counter()
        for severity in SEVERITIES:
            corrupt(images, name, severity)
        each[name] = time.perf_counter() - began
    return dict(
        images=n,
        size=224,
        settings=len(CORRUPTIONS) * len(SEVERITIES),
        cores=os.cpu_count(),
        seconds=sum(each.values()),
        each=each,
    )


PARTS = dict(maps=maps, corruptions=corruptions)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'parts', nargs='*', metavar='PART', help=f"of {', '.join(PARTS)}; default: all"
    )
    parser.add_argument('--out', type=Path, default=Path('results/benchmarks/explanation.json'))
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    found = json.loads(args.out.read_text()) if args.out.is_file() else {}
    for name in args.parts or PARTS:
        found[name] = PARTS[name]()
        print(name, to_json(found[name]), flush=True)
    found['hardware'] = dict(hardware(), processor=platform.processor())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.out) as f:
        f.write_text(to_json(found))
