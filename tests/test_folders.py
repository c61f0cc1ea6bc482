"""Folders of images as people have them: any name, links, bins, files without suffix, patients, lists of labels."""

import os

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cxr_study.core.run import Run, StudyError, read_table
from cxr_study.core.tables import file_text
from cxr_study.data.audit import write_audit
from cxr_study.data.cache import decoded
from cxr_study.data.dicom import to_dicom
from cxr_study.data.formats import find_images
from cxr_study.data.images import Preprocess
from cxr_study.data.sets import DataError, load_dataset
from cxr_study.data.splits import make_split

QUICK = settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# Any bytes that Linux allows in a name; a name that is not hidden
NAME = (
    st.binary(min_size=1, max_size=20)
    .map(lambda name: name.replace(b'\x00', b'').replace(b'/', b'').lstrip(b'.'))
    .filter(bool)
    .map(os.fsdecode)
    .filter(lambda name: name.lower() not in ('icon\r', 'dicomdir'))
)


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setenv('CXR_CACHE', str(tmp_path / 'cache'))


def pixels(seed):
    return np.random.default_rng(seed).integers(0, 255, (40, 40), np.uint8)


def write_image(path, seed=0, kind='PNG'):
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == 'DICOM':
        path.write_bytes(to_dicom(pixels(seed)))
    else:
        Image.fromarray(pixels(seed)).save(path, kind)
    return path


def class_folders(root, n=8):
    for c, name in enumerate(('NORMAL', 'PNEUMONIA')):
        for i in range(n):
            write_image(root / name / f'{name[0].lower()}{i}.png', 100 * c + i)
    return root


def notes(image_set):
    return ' '.join(image_set.provenance.get('notes', []))


# --- Names ---


@pytest.mark.parametrize(
    'name',
    [
        'chest 10",AP.png',
        "quote's, \"double\".png",
        'line\nbreak.png',
        'carriage\rreturn.png',
        ' blanks .png',
        'NA',
        'a$b$_{c}\\frac.png',
        '<b>&amp;.png',
        os.fsdecode(b'M\xfcller.png'),
        'Müller 胸部.png',
        '-h.png',
        '%s{0}.png',
    ],
)
def test_any_name_survives_cache_split_tables_and_audit(tmp_path, name):
    own = class_folders(tmp_path / 'own')
    write_image(own / 'NORMAL' / name, 999)
    image_set = load_dataset(own)
    _, index, _ = decoded(image_set, Preprocess(32))
    expected = 'NORMAL/' + file_text(name)
    assert len(image_set) == 17 and index.sha256.nunique() == 17
    assert list(index.image_id) == list(image_set.table.image_id) and expected in set(
        index.image_id
    )
    table, _ = make_split(image_set, index.sha256)
    run = Run(tmp_path / 'run').begin('01_data')
    run.write('split.csv', table[table.split != ''])
    run.finish()
    assert expected in set(run.read('split.csv').image_id)
    decoded(load_dataset(own), Preprocess(32))  # From the cache


def test_an_audit_of_odd_names_finds_no_copies(tmp_path):
    own = class_folders(tmp_path / 'own', 10)
    for i, name in enumerate(('10",AP.png', 'a$b$c\n.png', os.fsdecode(b'\xff\xfe.png'))):
        write_image(own / 'PNEUMONIA' / name, 900 + i)
    facts = write_audit(own, tmp_path / 'audit')
    assert facts['images'] == 23 and facts['copies']['groups'] == 0
    assert (tmp_path / 'audit/audit.html').stat().st_size > 1000


@given(st.sets(NAME, min_size=1, max_size=4))
@QUICK
def test_names_of_any_bytes(tmp_path_factory, names):
    root = tmp_path_factory.mktemp('names')
    class_folders(root / 'own', 2)
    for i, name in enumerate(sorted(names)):
        write_image(root / 'own' / 'NORMAL' / name, 500 + i)
    image_set = load_dataset(root / 'own')
    _, index, _ = decoded(image_set, Preprocess(16), root / 'cache')
    assert len(image_set) == 4 + len(names) == index.sha256.nunique()
    image_set.table.to_csv(root / 'table.csv', index=False)
    assert list(index.image_id) == list(image_set.table.image_id)


# --- What is an image ---


def test_hidden_files_bins_and_thumbnails_are_passed_over(tmp_path):
    own = class_folders(tmp_path / 'own')
    for i, path in enumerate(
        (
            '.ipynb_checkpoints/a-checkpoint.png',
            '.Trash-1000/files/deleted.png',
            '@eaDir/a.png/SYNOFILE_THUMB_M.png',
            '__MACOSX/a.png',
            '#recycle/b.png',
            '$RECYCLE.BIN/c.png',
            '~snapshot/nightly/d.png',
            '@Recently-Snapshot/e.png',
            'Network Trash Folder/f.png',
            '._a.png',
            '.DS_Store',
            'Thumbs.db',
        )
    ):
        write_image(own / 'NORMAL' / path, 300 + i)
        write_image(own / path, 300 + i)
    assert len(load_dataset(own)) == 16
    assert len(find_images(own).files) == 16 and not find_images(own).left_out


@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'DICOM'])
@pytest.mark.parametrize('name', ['IM000000', '1.2.840.113619.2.1', 'scan.jfif', 'x.bin', 'y.txt'])
def test_images_are_recognised_by_their_content(tmp_path, name, kind):
    own = class_folders(tmp_path / 'own', 2)
    write_image(own / 'NORMAL' / name, 9, kind)
    image_set = load_dataset(own)
    assert f'NORMAL/{name}' in set(image_set.table.image_id)
    assert 'notes' not in image_set.provenance
    decoded(image_set, Preprocess(16))


def test_what_is_no_image_is_named_and_counted(tmp_path):
    own = class_folders(tmp_path / 'own', 2)
    (own / 'NORMAL' / 'scan.tif').write_bytes(b'II*\x00')
    (own / 'NORMAL' / 'README').write_text('about')
    (own / 'NORMAL' / 'gone.png').symlink_to(tmp_path / 'nowhere')
    os.mkfifo(own / 'NORMAL' / 'pipe.png')
    write_image(own / 'loose.png')
    said = notes(load_dataset(own))
    assert 'Files left out: 5' in said
    for name in ('scan.tif', 'README', 'gone.png', 'pipe.png', 'loose.png'):
        assert name in said
    facts = write_audit(own, tmp_path / 'audit')
    assert any('Files left out: 5' in sentence for _, sentence in facts['findings'])


def test_an_unknown_format_is_named_where_a_class_is_empty(tmp_path):
    own = class_folders(tmp_path / 'own', 2)
    for path in (own / 'NORMAL').iterdir():
        path.rename(path.with_suffix('.tif'))
        path.with_suffix('.tif').write_bytes(b'II*\x00')
    with pytest.raises(DataError, match='NORMAL holds no image.*n0.tif'):
        load_dataset(own)


def test_links_are_followed_and_may_lead_back(tmp_path):
    own = tmp_path / 'own'
    elsewhere = class_folders(tmp_path / 'elsewhere')
    own.mkdir()
    (own / 'NORMAL').symlink_to(elsewhere / 'NORMAL')
    (own / 'PNEUMONIA').mkdir()
    for path in (elsewhere / 'PNEUMONIA').iterdir():
        (own / 'PNEUMONIA' / path.name).symlink_to(path)
    (own / 'PNEUMONIA' / 'back').symlink_to(own)
    (own / 'PNEUMONIA' / 'round').symlink_to(own / 'PNEUMONIA' / 'round')
    image_set = load_dataset(own)
    assert set(image_set.table.image_id.str.split('/').str[0]) == {'NORMAL', 'PNEUMONIA'}
    assert (image_set.table.image_id.str.count('/') == 1).sum() == 16


def test_a_folder_that_cannot_be_opened_is_a_sentence(tmp_path, monkeypatch):
    own = class_folders(tmp_path / 'own', 2)
    scandir = os.scandir

    def closed(path):
        if os.fspath(path).endswith('PNEUMONIA'):
            raise PermissionError(13, 'Permission denied')
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', closed)
    with pytest.raises(StudyError, match='PNEUMONIA cannot be opened: Permission denied'):
        find_images(own)


# --- Patients ---


def patient_folders(root, patients, images=3, names='p{:02d}'):
    for i in range(patients):
        name = ('NORMAL', 'PNEUMONIA')[i % 2]
        for k in range(images):
            write_image(root / name / names.format(i) / f'{k}.png', 10 * i + k)
    return root


def test_class_patient_image_keeps_patients_whole(tmp_path):
    own = patient_folders(tmp_path / 'own', 30)
    image_set = load_dataset(own)
    _, index, _ = decoded(image_set, Preprocess(16))
    table, _ = make_split(image_set, index.sha256)
    folder = table.image_id.str.split('/').str[1]
    assert image_set.patients_known and list(image_set.table.patient_id) == list(folder)
    assert table[table.split != ''].groupby(folder).split.nunique().max() == 1
    assert 'taken for patients (30)' in notes(image_set) and '--patients unknown' in notes(
        image_set
    )
    unknown = load_dataset(own, patients='unknown')
    assert not unknown.patients_known and unknown.table.patient_id.nunique() == 90


@pytest.mark.parametrize(
    'names,recognised',
    [('p{:02d}', True), ('study/{}', True), ('{}/study', True), ('{}', True)],
)
def test_folders_of_patients_at_any_depth(tmp_path, names, recognised):
    image_set = load_dataset(patient_folders(tmp_path / 'own', 12, names=names))
    assert image_set.patients_known == recognised
    assert image_set.table.patient_id.nunique() == 12


@pytest.mark.parametrize('beside', (None, 'images'))
def test_folders_of_masks_below_the_classes_are_named(tmp_path, beside):
    own = class_folders(tmp_path / 'own')
    for name in ('NORMAL', 'PNEUMONIA'):
        if beside:
            files = list((own / name).iterdir())
            (own / name / beside).mkdir()
            for file in files:
                file.rename(own / name / beside / file.name)
        for i in range(3):
            write_image(own / name / 'masks' / f'{i}.png', i)
    image_set = load_dataset(own)
    assert len(image_set) == 22
    assert "'masks' (6)" in notes(image_set) and not image_set.patients_known
    assert notes(load_dataset(class_folders(tmp_path / 'plain'))) == ''


def test_folders_that_are_no_patients_are_mentioned(tmp_path):
    own = tmp_path / 'own'
    for c, name in enumerate(('NORMAL', 'PNEUMONIA')):
        for v, view in enumerate(('AP', 'PA')):
            for i in range(4):
                write_image(own / name / view / f'{i}.png', 100 * c + 10 * v + i)
    image_set = load_dataset(own)
    assert not image_set.patients_known and '--patients folders' in notes(image_set)
    assert load_dataset(own, patients='folders').table.patient_id.nunique() == 2
    write_image(own / 'NORMAL' / 'loose.png', 77)
    assert not load_dataset(own).patients_known
    assert "'AP' (8), 'PA' (8)" in notes(load_dataset(own))
    with pytest.raises(DataError, match='cannot be the patients'):
        load_dataset(own, patients='folders')


# --- Lists of labels ---


def listed(root, names, labels=None, **columns):
    labels = labels or [str(i % 2) for i in range(len(names))]
    table = pd.DataFrame(dict(file=names, label=labels, **columns))
    table.to_csv(root / 'labels.csv', index=False)
    return root / 'labels.csv'


@pytest.mark.parametrize(
    'written',
    [
        '{}.png',
        './{}.png',
        ' {}.png',
        'images/{}.png',
        '{folder}/images/{}.png',
        '/other/machine/{}.png',
    ]
    + ['C:\\data\\images\\{}.png', 'own/{}.png', 'images\\{}.png'],
)
def test_names_in_a_list_with_any_folder_in_front(tmp_path, written):
    own = tmp_path / 'own'
    for i in range(4):
        write_image(own / 'images' / f'{i}.png', i)
    names = [written.replace('{folder}', str(own)).format(i) for i in range(4)]
    image_set = load_dataset(listed(own, names))
    assert list(image_set.table.image_id) == [f'{i}.png' for i in range(4)]
    assert list(image_set.table.label) == [0, 1, 0, 1]


def test_absolute_names_elsewhere(tmp_path):
    elsewhere = tmp_path / 'elsewhere'
    (tmp_path / 'lists').mkdir()
    names = [str(write_image(elsewhere / 'ab'[i % 2] / f'{i}.png', i)) for i in range(4)]
    image_set = load_dataset(listed(tmp_path / 'lists', names))
    assert list(image_set.table.image_id) == ['a/0.png', 'b/1.png', 'a/2.png', 'b/3.png']
    decoded(image_set, Preprocess(16))


def test_a_folder_in_front_is_never_guessed_for_some_rows_only(tmp_path):
    own = tmp_path / 'own'
    for i in range(4):
        write_image(own / f'{i}.png', i)
    with pytest.raises(DataError, match='names 2 files that are not in'):
        load_dataset(listed(own, ['0.png', '1.png', 'x/2.png', 'y/3.png']))
    with pytest.raises(DataError, match='listed more than once'):
        load_dataset(listed(own, ['0.png', './0.png']))


def test_labels_of_a_list(tmp_path):
    own = tmp_path / 'own'
    names = [write_image(own / f'{i}.png', i).name for i in range(8)]
    labels = ['Normal', 'NORMAL ', 'normal', 'PNEUMONIA', 'pneumonia', '', 'uncertain', '-1']
    image_set = load_dataset(listed(own, names, labels))
    assert list(image_set.table.label) == [0, 0, 0, 1, 1]
    assert image_set.provenance['left_out'] == {'label missing': 1, 'label uncertain': 2}
    assert 'labels.csv left out: 3' in notes(image_set)
    numbers = load_dataset(listed(own, names, ['0.0', '1.0', '1', '0', '', '1.0', '0', '0']))
    assert list(numbers.table.label) == [0, 1, 1, 0, 1, 0, 0]


def test_patients_of_a_list(tmp_path):
    own = tmp_path / 'own'
    names = [write_image(own / f'{i}.png', i).name for i in range(4)]
    both = load_dataset(listed(own, names, patient=['a', 'a', '', ' '], patient_id=[1, 2, 3, 4]))
    assert list(both.table.patient_id) == ['a', 'a', '2.png', '3.png']
    assert 'patient is used' in notes(both)
    only = load_dataset(listed(own, names, patient_id=['7', '7', None, None]))
    assert list(only.table.patient_id) == ['7', '7', '2.png', '3.png'] and only.patients_known


@pytest.mark.parametrize('name', ['PatientID', 'Patient ID', 'subject_id'])
def test_a_column_that_is_called_like_patients_is_no_subgroup(tmp_path, name):
    own = tmp_path / 'own'
    names = [write_image(own / f'{i}.png', i).name for i in range(4)]
    image_set = load_dataset(listed(own, names, **{name: [7, 7, 8, 9]}))
    assert list(image_set.table.patient_id) == ['7', '7', '8', '9'] and image_set.patients_known
    assert name not in image_set.table and f'{name} is taken for the patients' in notes(image_set)


def test_two_columns_that_are_called_like_patients_get_a_sentence(tmp_path):
    own = tmp_path / 'own'
    names = [write_image(own / f'{i}.png', i).name for i in range(4)]
    image_set = load_dataset(listed(own, names, PatientID=[7, 7, 8, 9], subject=[1, 2, 3, 4]))
    assert not image_set.patients_known
    assert 'PatientID and subject could all be the patients; none is used' in notes(image_set)


@pytest.mark.parametrize('encoding', ['utf-16', 'latin-1', 'utf-8-sig'])
@pytest.mark.parametrize('disk', ['utf-8', 'latin-1'])
def test_a_list_in_another_encoding_finds_its_files(tmp_path, encoding, disk):
    own = tmp_path / 'own'
    write_image(own / os.fsdecode('Müller.png'.encode(disk)), 1)
    write_image(own / 'b.png', 2)
    text = 'file;label\nMüller.png;1\nb.png;0\n'
    (own / 'labels.csv').write_bytes(text.encode(encoding))
    if encoding != 'latin-1' and disk == 'latin-1':
        with pytest.raises(DataError, match='such as Müller.png'):
            load_dataset(own)
    else:
        assert len(load_dataset(own)) == 2


def test_a_positive_class_that_sounds_negative_gets_a_sentence(tmp_path):
    own = class_folders(tmp_path / 'own', 2)
    (own / 'NORMAL').rename(own / 'No finding')
    with pytest.raises(DataError, match="--positive 'No finding' or --positive PNEUMONIA"):
        load_dataset(own)
    assert 'sounds like the negative one' in notes(load_dataset(own, 'No finding'))
    image_set = load_dataset(own, 'pneumonia')
    assert image_set.classes == ('No finding', 'PNEUMONIA') and not notes(image_set)


def test_a_table_with_returns_in_names_reads_back(tmp_path):
    run = Run(tmp_path / 'run').begin('01_data')
    run.write('t.csv', pd.DataFrame(dict(name=['a\r', 'b'], x=[0.1, 2.0])))
    assert list(read_table(tmp_path / 'run/t.csv', dict(name=str)).name) == ['a\r', 'b']


# --- A bundle on images of one's own ---


def test_a_bundle_is_evaluated_on_all_test_images_or_says_how_many_were_drawn(tmp_path):
    pytest.importorskip('onnx')
    from cxr_study.pipeline.bundle_evaluation import evaluate_bundle
    from cxr_study.serve.bundle import example_bundle

    bundle = example_bundle(tmp_path / 'bundle', size=32)
    out = tmp_path / 'out'

    def evaluated(own):
        _, said = evaluate_bundle(bundle, out, own, replicates=50)
        return len(pd.read_csv(out / 'predictions.csv')), ' '.join(said)

    few = class_folders(tmp_path / 'few', 3)
    with pytest.raises(StudyError, match='5 folds .* put them into a folder `test`'):
        evaluated(few)
    only = tmp_path / 'only'
    class_folders(only / 'test', 3)
    assert evaluated(only)[0] == 6
    class_folders(only / 'train', 2)
    count, said = evaluated(only)
    assert count == 6 and 'drawn' not in said
    count, said = evaluated(class_folders(tmp_path / 'plain', 20))
    assert 0 < count < 40 and f'{count} of its 40 images were drawn' in said
