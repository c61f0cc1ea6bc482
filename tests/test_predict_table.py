"""`cxr-study predict` into a table: names of files, other options, failed files, and what the rows say."""

import csv
import io
import os

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_study.core.run import StudyError
from cxr_study.core.tables import file_text
from cxr_study.data.formats import find_images
from cxr_study.data.sets import load_dataset
from cxr_study.serve.bundle import example_bundle
from cxr_study.serve.predictor import Predictor, predict_files

RAMP = np.linspace(0, 255, 96).astype(np.uint8) * np.ones((64, 1), np.uint8)


@pytest.fixture(scope='module')
def predictor(tmp_path_factory):
    return Predictor(example_bundle(tmp_path_factory.mktemp('bundle') / 'b'))


def encoded(pixels, kind='PNG'):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def films(folder, names):
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded((RAMP * ((i + 1) / len(names))).astype(np.uint8)))
    return folder


def rows_of(out):
    with open(out, encoding='utf-8', newline='') as file:
        return list(csv.DictReader(file, strict=True))


def test_any_name_is_written_once_and_found_again(predictor, tmp_path):
    names = [
        'chest 10",AP.png',
        'line\nbreak.png',
        'return\r.png',
        os.fsdecode(b'M\xfcller.png'),
        'IM1',
        ' b ',
    ]
    folder = films(tmp_path / 'in', names)
    out = tmp_path / 'out.csv'
    predict_files([folder], out, predictor, say=str)
    expected = sorted(str(folder) + '/' + file_text(name) for name in names)
    assert sorted(row['file'] for row in rows_of(out)) == expected
    assert sorted(pd.read_csv(out).file) == expected
    whole = out.read_bytes()
    assert predict_files([folder], out, predictor, say=str)['before'] == len(names)
    assert out.read_bytes() == whole


def test_a_table_that_was_cut_anywhere_is_completed(predictor, tmp_path):
    folder = films(tmp_path / 'in', ['a\n"b.png', 'c\r.png', 'd,e.png'])
    out = tmp_path / 'out.csv'
    predict_files([folder], out, predictor, say=str)
    whole = out.read_bytes()
    for cut in range(0, len(whole), 29):
        out.write_bytes(whole[:cut])
        predict_files([folder], out, predictor, say=str)
        assert out.read_bytes() == whole


@pytest.mark.parametrize(
    'options', [dict(point='half'), dict(prevalence=0.02), dict(point='half', prevalence=0.5)]
)
def test_other_options_are_refused(predictor, tmp_path, options):
    folder = films(tmp_path / 'in', ['a.png', 'b.png'])
    out = tmp_path / 'out.csv'
    predict_files([folder], out, predictor, say=str)
    whole = out.read_bytes()
    with pytest.raises(
        StudyError, match='was written with model .* and now it is .*Name another file'
    ):
        predict_files([folder], out, predictor, say=str, **options)
    assert out.read_bytes() == whole
    other = tmp_path / 'other.csv'
    predict_files([folder], other, predictor, say=str, **options)
    assert predict_files([folder], other, predictor, say=str, **options)['before'] == 2


@pytest.mark.parametrize(
    'content', [b'a,b\n1,2\n', b'\xff\xfe\x00', b'file,probability\nx,0.5\n', b'"a\n']
)
def test_the_table_of_another_program_is_left_alone(predictor, tmp_path, content):
    out = tmp_path / 'out.csv'
    out.write_bytes(content)
    with pytest.raises(StudyError, match='another program'):
        predict_files([films(tmp_path / 'in', ['a.png'])], out, predictor, say=str)
    assert out.read_bytes() == content


def test_failed_files_are_tried_again(predictor, tmp_path):
    folder = films(tmp_path / 'in', ['a.png', 'b.png'])
    broken = folder / 'broken.jpg'
    broken.write_bytes(encoded(RAMP, 'JPEG')[:500])
    out = tmp_path / 'out.csv'
    said = []
    for before in (0, 2):
        counts = predict_files([folder], out, predictor, say=said.append)
        assert counts['failed'] == 1 and counts['before'] == before
        assert '1 failed' in said[-1]
    assert len(rows_of(out)) == 3
    broken.write_bytes(encoded(RAMP, 'JPEG'))
    assert predict_files([folder], out, predictor, say=str)['failed'] == 0
    assert len(rows_of(out)) == 3 and not any(row['error'] for row in rows_of(out))


def test_another_image_under_the_same_name_is_predicted_anew(predictor, tmp_path, monkeypatch):
    folder = films(tmp_path / 'in', ['a.png', 'b.png', 'c.png'])
    out = tmp_path / 'out.csv'
    predict_files([folder], out, predictor, say=str)
    stamp = (folder / 'a.png').stat()
    first = {row['file']: row for row in rows_of(out)}
    (folder / 'a.png').write_bytes(encoded(255 - RAMP))
    os.utime(folder / 'a.png', ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    (folder / 'b.png').write_bytes(b'')
    counts = predict_files([folder], out, predictor, say=str)
    assert counts['before'] == 1 and counts['failed'] == 1
    rows = {row['file']: row for row in rows_of(out)}
    a, b, c = sorted(rows)
    assert len(rows_of(out)) == 3 and rows[c] == first[c] and rows[b]['error']
    assert rows[a]['logit'] != first[a]['logit'] and rows[a]['sha256'] != first[a]['sha256']
    elsewhere = films(tmp_path / 'elsewhere', ['a.png', 'b.png'])
    table = tmp_path / 'relative.csv'
    for place, before in ((elsewhere, 0), (elsewhere, 2), (folder, 0)):
        monkeypatch.chdir(place)  # The same relative names, of other files
        paths = ['a.png', 'b.png'] if place == elsewhere else ['a.png']
        assert predict_files(paths, table, predictor, say=str)['before'] == before


@pytest.mark.parametrize('levels, unfamiliar', [(2, True), (16, True), (32, None), (256, None)])
def test_an_image_of_few_grey_levels_is_unfamiliar(predictor, levels, unfamiliar):
    answer = predictor(encoded(RAMP // (256 // levels)))
    assert answer['unfamiliar'] is unfamiliar
    assert not unfamiliar or 'grey levels' in answer['unfamiliar_reason']


def test_a_row_without_an_answer_has_no_class_as_its_decision(predictor, tmp_path):
    folder = films(tmp_path / 'in', [f'{i}.png' for i in range(12)])
    sunset = np.dstack([RAMP, RAMP // 2, 255 - RAMP])
    (folder / 'colour.png').write_bytes(encoded(sunset))
    (folder / 'empty.png').write_bytes(b'')
    out = tmp_path / 'out.csv'
    said = []
    counts = predict_files([folder], out, predictor, say=said.append)
    rows = rows_of(out)
    for row in rows:
        if row['error']:
            assert row['decision'] == row['at_threshold'] == ''
        elif row['unfamiliar'] == 'True':
            assert row['decision'] == 'UNFAMILIAR'
        elif row['abstains'] == 'True':
            assert row['decision'] == 'ABSTAINED'
        else:
            assert row['decision'] == row['at_threshold'] in ('NORMAL', 'PNEUMONIA')
    kinds = pd.Series([row['decision'] or 'failed' for row in rows]).value_counts()
    assert (
        counts['unfamiliar'] == kinds['UNFAMILIAR'] == 1
        and counts['failed'] == kinds['failed'] == 1
    )
    assert counts['abstained'] == kinds.get('ABSTAINED', 0) > 0
    assert counts['answered'] == len(rows) - 2 - counts['abstained'] > 0
    assert '1 unfamiliar, 1 failed' in said[-1]


def test_data_and_predict_find_the_same_files(predictor, tmp_path):
    folder = films(
        tmp_path / 'in',
        [
            'NORMAL/a.png',
            'NORMAL/IM1',
            'PNEUMONIA/b.jfif',
            'PNEUMONIA/.x/c.png',
            'PNEUMONIA/@eaDir/d.png',
        ],
    )
    (folder / 'NORMAL' / 'notes.txt').write_text('none')
    (folder / 'PNEUMONIA' / 'link.png').symlink_to(folder / 'NORMAL' / 'a.png')
    said = []
    predict_files([folder], tmp_path / 'out.csv', predictor, say=said.append)
    image_set = load_dataset(folder)
    of_data = {str(folder / name) for name in image_set.table.image_id}
    assert of_data == {row['file'] for row in rows_of(tmp_path / 'out.csv')}
    assert of_data == set(map(str, find_images(folder).files))
    assert 'notes.txt' in said[0] and 'notes.txt' in image_set.provenance['notes'][0]
