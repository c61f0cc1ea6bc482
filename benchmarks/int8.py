"""int8 against float32: the gate on validation, and time on one thread (analysis plan, section 5).

Networks of the second edition whose weights are in the repository are quantised as `cxr-study bundle --int8` does,
with ranges from training films. Written to results/benchmarks/int8.json: loss of AUC, changed decisions, size, and
milliseconds a film, medians of turns that alternate. No test is opened.

usage: int8.py [--out FILE] [--networks efficientnet distilled] [--turns 15]
CXR_DATA has to hold chest_xray.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import onnxruntime
from covered_films import KEYS, edition_network_module
from second_edition_films import WIDE
from second_edition_findings import Network, threshold_in_use
from second_edition_tables import films_of, read

from cxr_study.core.run import atomic_write, hardware, root, to_json, versions
from cxr_study.data.cache import decoded
from cxr_study.data.images import Preprocess
from cxr_study.data.sets import load_dataset
from cxr_study.pipeline.export import INT8_LIMITS, _judge_int8, quantise, run_onnx, to_onnx
from cxr_study.predict.decision import (
    Calibration,
    Calibrator,
    ConformalSets,
    OperatingPoint,
    sigmoid,
)

EDITION = root() / 'results/second_edition'
RANGES = 256  # Training films that the ranges are measured on
TURN = 20  # Films of one timed turn


def calibration_of(network):
    "The plan's calibrator and threshold of a training, as the gate reads them"
    slope, intercept = network.line(0)
    threshold = threshold_in_use(network.calibrated(0, 'val/plain'), network.val(0))
    point = OperatingPoint('in use', float(sigmoid(threshold)), "the plan's rule", 'validation', {})
    calibrator = Calibrator('platt', dict(slope=slope, intercept=intercept))
    sets = ConformalSets(0.05, 0.0, 0.0, {})
    return Calibration(calibrator, (point,), 'in use', sets, 0.5)


def session(content):  # ONNX network
    "A session on one thread"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(content, options, providers=['CPUExecutionProvider'])


def milliseconds(sessions, images, turns):  # Name -> session; uint8 [n, H, W]
    "Median milliseconds a film of each session, in turns that alternate"
    found = {name: [] for name in sessions}
    for turn in range(turns + 1):
        for name, one in sessions.items():
            began = time.perf_counter()
            for image in images:
                one.run(['logit'], dict(image=image[None, None]))
            if turn:  # The first warms up
                found[name].append(1000 * (time.perf_counter() - began) / len(images))
    return {name: float(np.median(values)) for name, values in found.items()}


def compare(name, images, turns):  # Of `KEYS`; uint8 [films, 224, 224]
    "What int8.json says of one network"
    facts, logits = read(*sorted(EDITION.glob('call*')))
    films = films_of(facts, 'chest_xray')
    films = films.assign(wide=films.ratio >= WIDE)
    jobs = [entry for entry in facts['jobs'] if entry['key'] == KEYS[name]]
    network = Network('chest_xray', jobs, logits, films)
    val = np.flatnonzero(films.fold == 0)
    train = np.flatnonzero((films.fold != 0) & (films.fold != -2))
    sample = np.random.default_rng(0).permutation(train)[:RANGES]
    content = to_onnx(edition_network_module(name))
    int8 = quantise(content, images[np.sort(sample)])
    z, z8 = (run_onnx(c, images[val])[:, 0] for c in (content, int8))
    judged = _judge_int8(films.label.to_numpy()[val], z, z8, calibration_of(network))
    sessions = dict(float32=session(content), int8=session(int8))
    took = milliseconds(sessions, images[val[:TURN]], turns)
    return judged | dict(
        key=KEYS[name],
        milliseconds=took,
        times_as_fast=took['float32'] / took['int8'],
        megabytes=dict(float32=len(content) / 1e6, int8=len(int8) / 1e6),
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', type=Path, default=root() / 'results/benchmarks/int8.json')
    parser.add_argument('--networks', nargs='+', choices=list(KEYS), default=list(KEYS))
    parser.add_argument('--turns', type=int, default=15)
    options = parser.parse_args()
    images, _, _ = decoded(load_dataset('chest_xray'), Preprocess(224))
    networks = {name: compare(name, images, options.turns) for name in options.networks}
    facts = dict(
        schema=1,
        networks=networks,
        gate=INT8_LIMITS,
        threads=1,
        hardware=hardware(),
        versions=versions(('onnxruntime', 'torch')),
    )
    with atomic_write(options.out) as file:
        file.write_text(to_json(facts, indent=1) + '\n')
    print(to_json(networks, indent=1))


if __name__ == '__main__':
    main()
