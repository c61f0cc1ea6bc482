"Films that both ensembles call wrong: counted again from committed predictions"

import json

import hard_films
import pandas as pd
import pytest


def test_counts_and_figures_follow_from_the_committed_logits(tmp_path):
    hard_films.main(['--out', str(tmp_path), '--replicates', '20'])
    committed, again = (
        json.loads((folder / 'hard_films.json').read_text())['figures']
        for folder in (hard_films.EDITION, tmp_path)
    )
    assert again.keys() == committed.keys()
    for name, entry in again.items():
        assert entry['value'] == pytest.approx(committed[name]['value'], abs=1e-9), name
    table = pd.read_csv(hard_films.EDITION / 'hard_films.csv')
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / 'hard_films.csv'), table)
    both = table[table.resnet18_wrong & table.efficientnet_wrong]
    assert list(both.image_id) == list(table.image_id[table.both_wrong])
    assert committed['all.both']['value'] == len(both)
    assert table.groupby('set').size().to_dict() == {
        'common normals': 168,
        'pneumonias': 390,
        'the 66': 66,
    }
