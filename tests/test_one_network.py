"The shipped network beside others, and the learning curve: derived again from committed logits"

import json

import one_network
import pandas as pd
import pytest
from learning_curve import PARTS, curve_jobs, drawn_children


def test_figures_follow_from_the_committed_logits():
    committed = json.loads((one_network.EDITION / 'one_network.json').read_text())['figures']
    again = one_network.all_figures(replicates=20)
    assert again.keys() == committed.keys()
    for name, entry in again.items():
        if committed[name]['value'] is not None:
            assert entry['value'] == pytest.approx(committed[name]['value'], abs=1e-9), name


def test_a_smaller_part_of_the_children_lies_in_a_larger_one():
    table = pd.DataFrame(dict(split=['train'] * 400 + ['val'] * 40))
    table['patient_id'] = [f'p{i // 2}' for i in range(len(table))]
    parts = [set(drawn_children(table, part, seed=0)) for part in sorted(PARTS)]
    assert [len(part) for part in parts] == [20, 50, 100]
    assert parts[0] < parts[1] < parts[2] < set(table.patient_id[table.split == 'train'])
    assert set(drawn_children(table, 0.1, seed=1)) != parts[0]
    assert len({job.key for job in curve_jobs(range(5))}) == 15
