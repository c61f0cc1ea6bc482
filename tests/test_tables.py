"""Tables that others wrote: encodings, numbers, labels and patients that are missing, columns with other names."""

import bz2
import csv
import gzip
import io
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cxr_study.calibrate.calibrators import choose_calibrator
from cxr_study.core.run import StudyError, read_table, write_csv
from cxr_study.core.tables import complete_records, csv_record, patient_numbers, read_foreign
from cxr_study.data.splits import components
from cxr_study.evaluate import csv_tables
from cxr_study.evaluate.comparison import delong_test
from cxr_study.evaluate.csv_tables import evaluate, read_any
from cxr_study.evaluate.evaluation import evaluate_at
from cxr_study.evaluate.metrics import scored, simulate
from cxr_study.evaluate.misclassified import decisions

QUICK = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CELL = st.text(st.characters(codec='utf-8', exclude_characters='\x00'), max_size=12)
PRINTABLE = st.text(st.characters(codec='utf-8', exclude_categories=['Cc', 'Cs']), max_size=12)


def foreign(images=60, seed=1):
    "A table as another group writes it"
    table = simulate(patients=images, images=1, seed=seed)
    probability = 1 / (1 + np.exp(-table.logit))
    return pd.DataFrame(
        dict(image_id=table.image_id, label=table.label, probability=probability.round(4))
    )


def write(path, table, **how):
    table.to_csv(path, index=False, **how)
    return path


# --- Encodings, separators, numbers ---


@pytest.mark.parametrize('separator', [',', ';'])
@pytest.mark.parametrize('end', ['\n', '\r\n', '\r'])
@pytest.mark.parametrize('declared', [False, True])
def test_line_ends_of_every_system_are_known(tmp_path, separator, end, declared):
    text = foreign().to_csv(index=False, sep=separator, lineterminator=end)
    (tmp_path / 't.csv').write_bytes((f'sep={separator}{end}' * declared + text).encode())
    assert list(read_any(tmp_path / 't.csv').image_id) == list(foreign().image_id)


@pytest.mark.parametrize(
    'encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-32', 'latin-1', 'cp1252']
)
@pytest.mark.parametrize('separator', [',', ';', '\t', '|'])
def test_encodings_and_separators(tmp_path, encoding, separator):
    table = foreign()
    table.loc[0, 'image_id'] = 'Müller é, 10;"AP"'
    read = read_any(write(tmp_path / 't.csv', table, sep=separator, encoding=encoding))
    assert list(read.image_id) == list(table.image_id)
    assert np.allclose(1 / (1 + np.exp(-read.logit)), table.probability)


@pytest.mark.parametrize(
    'pack,suffix', [(gzip.compress, '.csv.gz'), (bz2.compress, '.csv'), (gzip.compress, '.csv')]
)
def test_compressed_tables_are_recognised_by_their_content(tmp_path, pack, suffix):
    content = foreign().to_csv(index=False).encode()
    (tmp_path / f't{suffix}').write_bytes(pack(content))
    assert len(read_any(tmp_path / f't{suffix}')) == 60


@pytest.mark.parametrize(
    'number',
    [
        lambda p: f'{p}'.replace('.', ','),
        lambda p: f'{100 * p:.2f} %',
        lambda p: f'{100 * p:.2f}%'.replace('.', ','),
    ],
)
def test_decimal_commas_and_percent(tmp_path, number):
    table = foreign()
    read = read_any(
        write(tmp_path / 't.csv', table.assign(probability=table.probability.map(number)))
    )
    assert np.allclose(1 / (1 + np.exp(-read.logit)), table.probability, atol=1e-4)


@pytest.mark.parametrize(
    'content',
    [
        b'',
        b'\n\n',
        b'PK\x03\x04 a workbook',
        b'\x89PNG\r\n\x1a\n\x00\x00',
        b'\x1f\x8b cut off',
        b'image_id,label,probability\na,1\n',
        b'image_id,label,probability\na,1,0.5,7\n',
        b'image_id,label,probability\n"a,1,0.5\n',
        b'image_id,label,probability\na,1,high\n',
        b'image_id,label,probability\na,1,50 %\nb,0,0.2\n',
        b'image_id,label,label,probability\na,1,0,0.5\n',
        b'image_id,label,probability\na,1,50\nb,0,20\n',
        b'image_id,label,probability\n',
    ],
)
def test_what_cannot_be_read_is_a_sentence(tmp_path, content):
    (tmp_path / 't.csv').write_bytes(content)
    with pytest.raises(StudyError):
        read_any(tmp_path / 't.csv')


@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=5), st.sampled_from([',', ';', '\t']))
@QUICK
def test_any_text_in_a_cell_is_read_back(tmp_path, rows, separator):
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=separator, quoting=csv.QUOTE_ALL)
    writer.writerows([('name', 'other'), *rows])
    (tmp_path / 't.csv').write_text(buffer.getvalue(), newline='')
    try:
        read = read_foreign(tmp_path / 't.csv')
    except StudyError as error:  # Control characters are taken for a file that is not text
        assert 'not text' in str(error)
        return
    expected = [row for row in rows if any(cell.strip() for cell in row)]
    assert list(map(tuple, read.to_numpy())) == expected


@given(st.lists(CELL, min_size=1, max_size=6))
@QUICK
def test_our_own_tables_read_back_any_text(tmp_path, names):
    table = pd.DataFrame(dict(name=names, x=np.arange(len(names)) / 3))
    write_csv(table, tmp_path / 't.csv')
    read = read_table(tmp_path / 't.csv', dict(name=str))
    assert list(read.name) == names and list(read.x) == list(table.x)


@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=6), st.integers(0, 200))
@QUICK
def test_records_written_one_by_one_survive_a_cut_at_any_byte(rows, cut):
    records = [csv_record(row).encode() for row in rows]
    content = b''.join(records)[:cut]
    complete = complete_records(content)
    assert complete == records[: len(complete)]
    assert len(b''.join(complete)) <= cut
    if cut >= len(b''.join(records)):
        assert complete == records


# --- Labels ---


@pytest.mark.parametrize(
    'spellings',
    [('NORMAL', 'Normal ', 'normal'), ('0', '0.0', ' 0'), ('False', 'FALSE', 'false')],
)
def test_spellings_of_one_label_are_one_label(tmp_path, spellings):
    positive = {'N': 'Pneumonia', '0': '1.0', 'F': 'True'}[spellings[0][0]]
    table = foreign()
    names = [spellings[i % 3] if not label else positive for i, label in enumerate(table.label)]
    read = read_any(write(tmp_path / 't.csv', table.assign(label=names)))
    assert list(read.label) == list(table.label)


@pytest.mark.parametrize('gone', ['', ' ', 'nan', 'NA', '-1', '-1.0', 'uncertain', 'unknown'])
@pytest.mark.parametrize('positive', [None, '1'])
def test_missing_and_uncertain_labels_are_left_out_and_counted(tmp_path, gone, positive):
    table = foreign()
    known = table.iloc[7:]
    labels = table.label.astype(str).where(table.index >= 7, gone)
    path = write(tmp_path / 't.csv', table.assign(label=labels))
    read = read_any(path, positive=positive)
    assert list(read.image_id) == list(known.image_id) and list(read.label) == list(known.label)
    assert (
        sum(read.attrs['left_out'].values()) == 7
        and '7 images are left out' in read.attrs['notes'][0]
    )


def test_minus_one_as_the_negative_class_is_asked_about(tmp_path):
    table = foreign()
    path = write(tmp_path / 't.csv', table.assign(label=table.label * 2 - 1))
    with pytest.raises(StudyError, match='If -1 is the negative class, write 0'):
        read_any(path, positive='1')


def test_two_other_names_are_both_listed_with_the_option(tmp_path):
    table = foreign()
    path = write(
        tmp_path / 't.csv', table.assign(label=table.label.map({0: 'clear', 1: 'an opacity'}))
    )
    with pytest.raises(
        StudyError, match="an opacity and clear.*--positive 'an opacity' or --positive clear"
    ):
        read_any(path)
    assert read_any(path, positive='AN OPACITY').attrs['classes'] == ('clear', 'an opacity')
    assert 'sounds like the negative' in read_any(path, positive='clear').attrs['notes'][0]


# --- Columns that an option names although their target is taken ---


@pytest.mark.parametrize(
    'option,ours',
    [
        ('label', 'label'),
        ('probability', 'probability'),
        ('image', 'image_id'),
        ('patient', 'patient_id'),
        ('split', 'split'),
    ],
)
def test_a_named_column_is_used_although_ours_is_there(tmp_path, option, ours):
    table = foreign().assign(patient_id=[f'p{i // 2}' for i in range(60)], split='test')
    wrong = table.assign(theirs=table[ours])
    wrong[ours] = wrong[ours].sample(frac=1, random_state=0).to_numpy()
    path = write(tmp_path / 't.csv', wrong)
    read = read_any(path, **{option: 'theirs'})
    right = read_any(write(tmp_path / 'right.csv', table))
    pd.testing.assert_frame_equal(read[list(right)], right)


def test_one_column_may_be_named_twice(tmp_path):
    table = foreign().drop(columns='image_id').assign(mrn=[f'm{i}' for i in range(60)])
    read = read_any(write(tmp_path / 't.csv', table), image='mrn', patient='mrn')
    assert list(read.image_id) == list(read.patient_id) == list(table.mrn)


# --- A missing patient is a patient of its own ---


@pytest.mark.parametrize('blank', [None, np.nan, '', '  ', 'NA'])
@pytest.mark.parametrize('share', [0.01, 0.5, 1.0])
def test_a_blank_patient_is_its_own_everywhere(blank, share):
    table = simulate(patients=80, images=2, seed=3)
    is_blank = np.arange(len(table)) < max(1, share * len(table))
    explicit = table.assign(
        patient_id=np.where(is_blank, 'own-' + table.image_id, 'p' + table.patient_id)
    )
    ids = pd.Series('p' + table.patient_id, dtype=object)
    ids[is_blank] = blank
    blanks = table.assign(patient_id=ids)

    assert scored(blanks).patients == scored(explicit).patients == explicit.patient_id.nunique()
    assert len(set(patient_numbers(blanks))) == explicit.patient_id.nunique()
    assert len(set(components(ids))) == explicit.patient_id.nunique()
    known = evaluate_at(explicit, replicates=50)['sensitivity']
    assert evaluate_at(blanks, replicates=50)['sensitivity']['patients'] == known['patients']
    assert (
        delong_test(blanks, blanks.assign(logit=-blanks.logit))['patients']
        == scored(explicit).patients
    )
    rows = decisions(blanks)
    assert rows.patient_id.nunique() == explicit.patient_id.nunique()


def test_calibration_counts_blank_patients_singly():
    table = simulate(patients=200, images=1, split='val', seed=5)
    blanks = table.assign(patient_id=[None] * len(table))
    known, _ = choose_calibrator(table)
    unknown, _ = choose_calibrator(blanks)
    assert unknown.kind == known.kind != 'none'


def test_blank_patients_with_the_names_of_images(tmp_path):
    table = foreign().assign(image_id=range(60), patient_id=[''] * 30 + list(range(30)))
    read = read_any(write(tmp_path / 't.csv', table))
    assert read.patient_id.nunique() == 60


def test_the_evaluation_says_what_is_left_out(tmp_path):
    table = foreign()
    labels = table.label.astype(str).where(table.index >= 5, '')
    path = write(tmp_path / 't.csv', table.assign(label=labels))
    _, notes = evaluate([path], tmp_path / 'out', replicates=20)
    assert '5 images are left out' in notes[0]
    assert '5 images are left out' in (tmp_path / 'out/report.html').read_text()


# --- Many tables ---


def test_several_processes_write_the_same_files_as_one(tmp_path, monkeypatch):
    for seed in range(4):
        simulate(patients=60, images=1, seed=seed).to_csv(tmp_path / f't{seed}.csv', index=False)
    tables = sorted(tmp_path.glob('*.csv'))
    written = []
    for fewest in (1, 99):
        monkeypatch.setattr(csv_tables, '_FEWEST', fewest)
        out = tmp_path / f'out{fewest}'
        evaluate(tables, out, replicates=50)
        files = sorted(path for path in out.rglob('*') if path.suffix in ('.png', '.svg', '.txt'))
        contents = {str(path.relative_to(out)): path.read_bytes() for path in files}
        written.append(contents | dict(metrics=(out / 'metrics.json').read_bytes()))
    assert written[0] == written[1] and len(written[0]) > 4 * 15


@pytest.mark.parametrize('method', ('bca', 'percentile'))
def test_another_interval_can_be_chosen(tmp_path, method):
    simulate(patients=60, images=1).to_csv(tmp_path / 't.csv', index=False)
    evaluate([tmp_path / 't.csv'], tmp_path / 'out', replicates=50, interval_method=method)
    found = json.loads((tmp_path / 'out' / 'metrics.json').read_text())['figures']['test.auc']
    expected = evaluate_at(read_any(tmp_path / 't.csv'), replicates=50, method=method)['auc']
    assert (found['lower'], found['upper']) == (expected['lower'], expected['upper'])
    with pytest.raises(StudyError, match='no interval method'):
        evaluate([tmp_path / 't.csv'], tmp_path / 'out', interval_method='exact')


# --- What a reader of the metrics has to know ---


@pytest.mark.parametrize('written', ['7.0', '7.', ' 7 '])
def test_a_patient_written_as_a_decimal_number_is_the_same_patient(tmp_path, written):
    rows = ['a,0,0.2,7', f'b,1,0.8,{written}', 'c,1,0.7,8']
    path = tmp_path / 'table.csv'
    path.write_text('\n'.join(['image_id,label,probability,patient_id', *rows]))
    assert csv_tables.read_csv(path).patient_id.tolist() == ['7', '7', '8']


def test_blank_patients_and_decisions_in_place_of_probabilities_are_mentioned(tmp_path):
    path = tmp_path / 'table.csv'
    path.write_text('image_id,label,probability,patient_id\na,0,0,p\nb,1,1,\nc,1,0,\n')
    patients, decisions = csv_tables.read_csv(path).attrs['notes']
    assert 'without a patient: 2' in patients and '0 or 1, as decisions are' in decisions
    path.write_text('image_id,label,probability,patient_id\na,0,0,p\nb,1,0.9,q\nc,1,0.4,r\n')
    assert csv_tables.read_csv(path).attrs['notes'] == []


@pytest.mark.parametrize('separator', [',', ';'])
def test_patients_that_a_spreadsheet_rounded_are_mentioned(tmp_path, separator):
    path = tmp_path / 'table.csv'
    point = ',' if separator == ';' else '.'
    for patient, notes in ((f'1{point}23457E+11', 1), ('123456789012', 0), ('E+11', 0)):
        rows = [['image_id', 'label', 'probability', 'patient_id'], ['a', '0', '1', patient]]
        path.write_text('\n'.join(separator.join(row) for row in [*rows, ['b', '1', '0', 'q']]))
        _, *found = sorted(csv_tables.read_csv(path).attrs['notes'], key=lambda n: 'rounded' in n)
        assert len(found) == notes and all('(1 images)' in note for note in found)


# --- Tables of others with all columns of ours ---


@pytest.mark.parametrize('name', ['predictions.csv', 'theirs.csv'])
def test_a_table_with_all_our_columns_is_read_as_a_foreign_one(tmp_path, name):
    table = simulate(patients=30, seed=1)
    number = pd.factorize(table.patient_id)[0]
    written = [f'{n}.0' if i % 2 else f'{n} ' for i, n in enumerate(number)]
    read = read_any(write(tmp_path / name, table.assign(patient_id=written)))
    assert read.patient_id.nunique() == table.patient_id.nunique()
    for twice in ('label', 'logit'):
        header, rest = table.assign(other=0).to_csv(index=False).split('\n', 1)
        (tmp_path / name).write_text(header.replace('other', twice) + '\n' + rest)
        with pytest.raises(StudyError, match=f'two columns {twice}'):
            read_any(tmp_path / name)
    blank = read_any(write(tmp_path / name, table.assign(patient_id='')))
    assert 'without a patient' in blank.attrs['notes'][0]


def test_patients_as_whole_and_decimal_numbers_are_the_same():
    table = pd.DataFrame(dict(image_id=['a', 'b', 'c', 'd'], patient_id=[7, 7.0, '7', '007']))
    assert list(patient_numbers(table.astype(object))) == [1, 1, 1, 0]


def test_probabilities_in_the_column_of_logits_are_mentioned(tmp_path):
    table = foreign().rename(columns=dict(probability='logit'))
    read = read_any(write(tmp_path / 't.csv', table))
    assert 'between 0 and 1' in read.attrs['notes'][0]
    read = read_any(write(tmp_path / 't.csv', table.assign(logit=simulate(60, images=1).logit)))
    assert read.attrs['notes'] == []


@pytest.mark.parametrize('name', ['patient', 'Patient ID', 'PatientID', 'subject_id'])
def test_a_column_that_is_called_patient_is_used(tmp_path, name):
    table = foreign()
    theirs = table.assign(**{name: np.arange(len(table)) // 2})
    read = read_any(write(tmp_path / 't.csv', theirs))
    assert read.patient_id.nunique() == len(table) // 2
    assert f'{name} is taken for the patients' in read.attrs['notes'][0]
    both = read_any(write(tmp_path / 't.csv', theirs.assign(patient_id=table.image_id)))
    assert both.patient_id.nunique() == len(table) and not both.attrs['notes']


def test_a_probability_that_differs_from_the_logit_is_mentioned(tmp_path):
    table = foreign().assign(logit=lambda t: np.log(t.probability / (1 - t.probability)))
    assert read_any(write(tmp_path / 't.csv', table)).attrs['notes'] == []
    table['probability'] = table.probability**2
    read = read_any(write(tmp_path / 't.csv', table))
    assert 'the logit is used' in read.attrs['notes'][0]
    assert np.allclose(read.logit, table.logit)
    named = read_any(tmp_path / 't.csv', probability='probability')
    assert np.allclose(1 / (1 + np.exp(-named.logit)), table.probability)
    assert named.attrs['notes'] == []
