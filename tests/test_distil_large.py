"Students of benchmarks/distil_large.py: each epoch shows another augmented copy, with the teachers' answer to it"

import dataclasses
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import distil_large
from distil_large import Copies, LargeBench, teachers_among
from second_edition import Job


def test_each_epoch_shows_another_copy_with_its_own_label():
    pixels = [np.full((5, 2, 2), copy, np.uint8) for copy in range(3)]
    logits = [np.full(5, copy, np.float32) for copy in range(3)]
    rows = Copies(pixels, logits, seed=0)
    seen = []
    for rows.epoch in range(3):
        x, y = map(torch.Tensor, rows.batch([4, 0, 2]))
        copy = x[:, 0, 0, 0]
        assert torch.allclose(y, copy.sigmoid())
        seen.append(copy)
    assert torch.stack(seen).sort(0).values.tolist() == [[0] * 3, [1] * 3, [2] * 3]


def test_all_six_teachers_are_needed():
    with pytest.raises(SystemExit, match="resnet18"):
        teachers_among([dict(jobs=[])])


def test_teachers_answer_the_copies_and_a_student_learns_from_them(data, tmp_path, monkeypatch):
    "At 32 pixels, from one untrained teacher, with as many copies as epochs"
    monkeypatch.setattr(distil_large, "COPIES", 2)
    bench = LargeBench(tmp_path, limit=60, tiny=False)
    small = Job("teach", "chest_xray", "wide", 10, size=32, epochs=1, augment="stretch_wide")
    _, facts = bench.run(small)
    teacher = dict(job=dataclasses.asdict(small), slope=1.0, intercept=0.5)
    student = dataclasses.replace(small, part="distil", epochs=2, teachers=(teacher,))
    for copy in range(2):
        bench.soften(student, copy)
    copies = [np.load(bench.copy_path("pixels", copy)) for copy in range(2)]
    assert len(copies[0]) == facts["films"] and not np.array_equal(*copies)
    logits, facts = bench.run(student)
    assert np.isfinite(logits["test/1"]).all() and len(facts["history"]["epoch"]) == 2
