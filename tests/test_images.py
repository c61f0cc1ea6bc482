"""From bytes to grey levels: against references computed from the stored arrays, damaged files and bombs."""

import functools
import io
import itertools
import os
import resource
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from pydicom import uid
from pydicom.dataelem import RawDataElement
from pydicom.encaps import encapsulate, generate_frames

from cxr_study.core.options import defaults
from cxr_study.core.run import StudyError
from cxr_study.data.cache import decoded
from cxr_study.data.decoders import Decoders
from cxr_study.data.dicom import to_dicom
from cxr_study.data.formats import (
    CorruptImage,
    ImageError,
    Limits,
    TooLarge,
    UnsupportedDicom,
    UnsupportedFormat,
    WrongShape,
    jpeg_segments,
)
from cxr_study.data.images import (
    _INTERLACED,
    Preprocess,
    _chunks,
    decode,
    dimensions,
    read_image,
    resize,
)
from cxr_study.data.sets import load_dataset

H, W = 48, 56


def stored(bits, signed, seed=0):
    "Numbers that fill nearly all of the range of so many bits, with ramps and noise"
    y, x = np.mgrid[:H, :W]
    top = 2**bits - 1
    a = (
        (
            (x / W * 0.7 + y / H * 0.25) * top
            + np.random.default_rng(seed).integers(0, max(2, top // 20), (H, W))
        )
        .clip(3, top - 2)
        .astype(np.int64)
    )
    if signed:
        a -= 2 ** (bits - 1)
    return a.astype(('i' if signed else 'u') + ('1' if bits == 8 else '2'))


def packed(data, order):
    "Bytes in words of a byte order"
    words = np.frombuffer(np.asarray(data, 'u1').tobytes() + bytes(len(data) % 2), '<u2')
    return words.astype(f'{order}u2').tobytes()


def lut(entries, first, bits, data, order='<', as_bytes=False):
    "A LUT sequence; entries as words in a byte order, as a list, or packed into bytes"
    item = pydicom.Dataset()
    item.LUTDescriptor = [entries, first, bits]
    if order == 'list':
        item.add_new('LUTData', 'US', [int(x) for x in data])
    elif as_bytes:
        item.add_new('LUTData', 'OW', packed(data, order))
    else:
        item.add_new('LUTData', 'OW', np.asarray(data, f'{order}u2').tobytes())
    return [item]


# --- The reference: the standard's formulas, value by value, in double precision ---


def reference(a, bits, signed, recipe, inverted, padding=None):
    value = {int(v): float(v) for v in np.unique(a) if v != padding}
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if bits > 8:
        low, high = min(value), max(value)
    if recipe.get('rescale'):
        value = {k: v * recipe['rescale'][0] + recipe['rescale'][1] for k, v in value.items()}
    if 'modality' in recipe:
        entries, first, depth, data = recipe['modality']
        value = {k: float(data[min(max(k - first, 0), entries - 1)]) for k in value}
        low, high = min(value.values()), max(value.values())
    elif recipe.get('rescale'):
        low, high = sorted(e * recipe['rescale'][0] + recipe['rescale'][1] for e in (low, high))
    if 'voi' in recipe:
        entries, first, depth, data = recipe['voi']
        shown = {
            k: data[min(max(int(round(v)) - first, 0), entries - 1)]
            / recipe.get('white', 2**depth - 1)
            for k, v in value.items()
        }
    elif 'window' in recipe:
        c, w = recipe['window']

        def windowed(x):
            if x <= c - 0.5 - (w - 1) / 2:
                return 0.0
            if x > c - 0.5 + (w - 1) / 2:
                return 1.0
            return (x - (c - 0.5)) / (w - 1) + 0.5

        shown = {k: windowed(v) for k, v in value.items()}
    else:
        shown = {k: (v - low) / (high - low) for k, v in value.items()}
    grey = {k: 255 * (1 - v if inverted else v) for k, v in shown.items()} | {padding: 0}
    return np.vectorize(lambda k: grey[int(k)])(a)


def recipes(bits, signed):
    low = -(2 ** (bits - 1)) if signed else 0
    n, mid = 2**bits, low + 2 ** (bits - 1)
    curve = np.round(1023 * np.sqrt(np.arange(n) / n)).astype(int)
    short = np.round(1023 * np.sqrt(np.linspace(0, 1, min(n, 4096)))).astype(int)
    dim = np.linspace(0, 250, n - 1 if n < 65536 else 59999).astype(int)  # An odd number of entries
    return {
        'plain': {},
        'window': dict(window=(mid, n // 3)),
        'rescale and window': dict(rescale=(2, -50), window=(2 * mid - 50, n)),
        'VOI LUT': dict(voi=(n % 65536 or 65536, low, 10, curve))
        if n < 65536
        else dict(voi=(60000, low + 100, 10, curve[:60000])),
        'narrow VOI LUT': dict(
            voi=(min(n, 60000) % 65536, low, 16, curve[:60000]), white=curve[:60000].max()
        ),
        'VOI LUT as a list': dict(voi=(len(short), low, 10, short), order='list'),
        'VOI LUT of bytes': dict(voi=(len(dim), low, 8, dim), as_bytes=True),
        'modality LUT': dict(
            modality=(
                min(n, 60000),
                low,
                16,
                np.round(65535 * (np.arange(min(n, 60000)) / n) ** 2).astype(int),
            )
        ),
    }


def elements(recipe, order='<'):
    found = {}
    order = recipe.get('order', order)
    if 'rescale' in recipe:
        found.update(
            RescaleSlope=recipe['rescale'][0],
            RescaleIntercept=recipe['rescale'][1],
            RescaleType='US',
        )
    if 'window' in recipe:
        found.update(WindowCenter=recipe['window'][0], WindowWidth=recipe['window'][1])
    if 'voi' in recipe:
        found['VOILUTSequence'] = lut(*recipe['voi'], order, recipe.get('as_bytes', False))
    if 'modality' in recipe:
        found['ModalityLUTSequence'] = lut(*recipe['modality'], order)
    return found


def lossless_jpeg(a, bits):
    "A lossless JPEG (process 14, predictor 1) by a minimal reference encoder: five bits for every category"
    a = np.asarray(a, np.int64) & (2**bits - 1)
    left = np.hstack([np.vstack([[2 ** (bits - 1)], a[:-1, :1]]), a[:, :-1]])
    diff = (a - left + 2**15) % 2**16 - 2**15
    code = ''
    for d in diff.ravel():
        size = int(abs(d)).bit_length()
        code += f'{size:05b}' + (
            f'{d if d > 0 else d + 2**size - 1:0{size}b}' if 0 < size < 16 else ''
        )
    code += '1' * (-len(code) % 8)
    body = int(code, 2).to_bytes(len(code) // 8).replace(b'\xff', b'\xff\x00')
    counts = bytes(17 if length == 5 else 0 for length in range(1, 17))
    return (
        b'\xff\xd8\xff\xc3'
        + struct.pack('>HBHHB3B', 11, bits, *a.shape, 1, 1, 0x11, 0)
        + b'\xff\xc4'
        + struct.pack('>HB', 3 + 16 + 17, 0)
        + counts
        + bytes(range(17))
        + b'\xff\xda'
        + struct.pack('>HB2B3B', 8, 1, 1, 0, 1, 0, 0)
        + body
        + b'\xff\xd9'
    )


def encapsulated(a, syntax, stream, **kwargs):
    "A DICOM file with an already compressed frame"
    ds = pydicom.dcmread(io.BytesIO(to_dicom(a, **kwargs)))
    ds.PixelData = encapsulate([stream])
    ds['PixelData'].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = syntax
    ds.save_as(buffer := io.BytesIO(), enforce_file_format=True)
    return buffer.getvalue()


def in_syntax(a, syntax, bits, **kwargs):
    if syntax == uid.JPEGLosslessSV1:
        return encapsulated(a, syntax, lossless_jpeg(a, bits), BitsStored=bits, **kwargs)
    if syntax == uid.ExplicitVRBigEndian:
        return to_dicom(a.byteswap(), syntax, BitsStored=bits, **kwargs)
    return to_dicom(a, syntax, BitsStored=bits, **kwargs)


SYNTAXES = [
    uid.ExplicitVRLittleEndian,
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.RLELossless,
    uid.JPEG2000Lossless,
    uid.JPEGLSLossless,
    uid.JPEGLosslessSV1,
]
KEEPS_UNUSED_BITS = SYNTAXES[:4]


def matrix():
    "Every eleventh possible combination of bits, sign, photometric, recipe, syntax, high bit and padding"
    recipe_names = list(recipes(8, False))
    every = itertools.product(
        (8, 10, 12, 16),
        (False, True),
        ('MONOCHROME1', 'MONOCHROME2'),
        recipe_names,
        SYNTAXES,
        (False, True),
        (False, True),
    )
    possible = [
        (bits, signed, photometric, name, syntax, shifted, padded)
        for bits, signed, photometric, name, syntax, shifted, padded in every
        if not shifted or (bits in (10, 12) and syntax in KEEPS_UNUSED_BITS)
    ]
    return possible[::11]


def radiograph(bits, signed, syntax, shifted, padding, **header):
    "(stored numbers, a DICOM file that holds them)"
    a = stored(bits, signed)
    if padding is not None:
        a[:7] = padding
        header['PixelPaddingValue'] = padding
    if not shifted:
        return a, in_syntax(a, syntax, bits, **header)
    words = a << (16 - bits)
    return a, in_syntax(words, syntax, bits, HighBit=15, **header)


@pytest.mark.parametrize('bits', (8, 10, 12, 16))
def test_dicom_matrix(bits):
    cases = [case for case in matrix() if case[0] == bits]
    assert len(cases) >= 25 and len(matrix()) >= 120
    wrong = []
    for case in cases:
        _, signed, photometric, name, syntax, shifted, padded = case
        recipe = recipes(bits, signed)[name]
        order = '>' if syntax == uid.ExplicitVRBigEndian else '<'
        padding = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        padding = padding if padded else None
        header = dict(PhotometricInterpretation=photometric, **elements(recipe, order))
        a, content = radiograph(bits, signed, syntax, shifted, padding, **header)
        expected = reference(a, bits, signed, recipe, photometric == 'MONOCHROME1', padding)
        if np.abs(decode(content) - expected).max() > 1:
            wrong.append(case)
    assert wrong == []


def png(a):
    Image.fromarray(a).save(buffer := io.BytesIO(), 'PNG')
    return buffer.getvalue()


def jpeg(a, **kwargs):
    Image.fromarray(a).save(buffer := io.BytesIO(), 'JPEG', **kwargs)
    return buffer.getvalue()


def test_baseline_jpeg_in_dicom_is_the_same_as_the_jpeg():
    a = stored(8, False)
    stream = jpeg(a, quality=95)
    in_dicom = decode(encapsulated(a, uid.JPEGBaseline8Bit, stream)).astype(int)
    assert np.abs(in_dicom - decode(stream)).max() <= 1


def test_multiple_windows_take_the_first_and_exact_and_sigmoid_functions_work():
    a = stored(12, False)
    first = decode(to_dicom(a, BitsStored=12, WindowCenter=[2000, 100], WindowWidth=[900, 50]))
    assert (first == decode(to_dicom(a, BitsStored=12, WindowCenter=2000, WindowWidth=900))).all()
    for function, f in dict(
        LINEAR_EXACT=lambda x: np.clip((x - 2000) / 900 + 0.5, 0, 1),
        SIGMOID=lambda x: 1 / (1 + np.exp(-4 * (x - 2000) / 900)),
    ).items():
        got = decode(
            to_dicom(a, BitsStored=12, WindowCenter=2000, WindowWidth=900, VOILUTFunction=function)
        )
        assert np.abs(got - 255 * f(a.astype(float))).max() <= 1


def test_a_voi_lut_of_eight_bits_with_many_entries_does_not_wrap():
    a = stored(12, False)
    table = np.linspace(0, 255, 4096).astype(int)
    got = decode(to_dicom(a, BitsStored=12, VOILUTSequence=lut(4096, 0, 8, table)))
    assert np.abs(got - table[a]).max() <= 1


def test_blanks_and_small_letters_of_a_modality_do_not_matter():
    a = stored(12, False)
    want = decode(to_dicom(a, BitsStored=12))
    assert (decode(to_dicom(a, BitsStored=12, Modality=' dx')) == want).all()


@pytest.mark.parametrize('kind', ['MONOCHROME1', 'MONOCHROME2'])
@pytest.mark.parametrize('shape', ['IDENTITY', ' inverse ', ''])
def test_a_presentation_shape_inverts_once_and_must_agree_with_the_interpretation(kind, shape):
    a = stored(12, False)
    header = dict(BitsStored=12, PhotometricInterpretation=kind)
    film = to_dicom(a, **header, PresentationLUTShape=shape)
    fits = 'MONOCHROME2' if shape == 'IDENTITY' else 'MONOCHROME1'
    if shape and kind != fits:
        with pytest.raises(UnsupportedDicom, match='contradict each other'):
            decode(film)
    else:
        assert (decode(film) == decode(to_dicom(a, **header))).all()


def test_an_enhanced_object_is_rejected():
    window = pydicom.Dataset()
    window.WindowCenter, window.WindowWidth = '500', '200'
    shared = pydicom.Dataset()
    shared.FrameVOILUTSequence = [window]
    film = to_dicom(stored(12, False), BitsStored=12, SharedFunctionalGroupsSequence=[shared])
    for read in (decode, dimensions):
        with pytest.raises(UnsupportedDicom, match='enhanced'):
            read(film)


REJECTED = {
    'modality is CT': dict(Modality='CT'),
    'modality is missing': dict(Modality=None),
    'lateral': dict(ViewPosition='LL'),
    'body part is ABDOMEN': dict(BodyPartExamined='ABDOMEN '),
    'body part is SPINE': dict(BodyPartExamined='C SPINE'),
    'raw data of the detector': dict(PresentationIntentType='FOR PROCESSING'),
    'not square': dict(ImagerPixelSpacing=[0.1, 0.2]),
    'lies on its side': dict(PatientOrientation=['H', 'L']),
    'several frames': dict(NumberOfFrames=2),
    'no pixel data': dict(PixelData=None),
    'modality is OT': dict(Modality=' ot '),
    'not a greyscale image': dict(PhotometricInterpretation='PALETTE COLOR'),
    'display window is not valid': dict(WindowCenter=1, WindowWidth=0),
}


@pytest.mark.parametrize('reason', REJECTED)
def test_errors_name_the_reason_and_nothing_about_the_patient(reason, caplog):
    secret = dict(
        PatientName='Doe^Jane',
        PatientID='MRN-4711',
        PatientBirthDate='19700101',
        ReferringPhysicianName='Who^Doctor',
        AccessionNumber='ACC99',
    )
    with (
        warnings.catch_warnings(record=True) as warned,
        pytest.raises(UnsupportedDicom, match=reason) as rejected,
    ):
        decode(to_dicom(stored(12, False), BitsStored=12, **secret, **REJECTED[reason]))
    output = str(rejected.value) + caplog.text + ''.join(str(w.message) for w in warned)
    assert not any(part in output for part in ('Doe', 'Jane', '4711', '1970', 'Who', 'ACC99'))


def test_lateral_by_orientation_or_view_code():
    code = pydicom.Dataset()
    code.CodeMeaning = 'Left lateral projection'
    for element in (dict(PatientOrientation=['A', 'F']), dict(ViewCodeSequence=[code])):
        with pytest.raises(UnsupportedDicom, match='lateral'):
            decode(to_dicom(stored(8, False), ViewPosition=None, **element))


@pytest.mark.parametrize(
    'view', ('AP LLD', 'PA_RLD', 'XTABLE LATERAL', 'LLAT', 'XTLAT', 'L LAT', 'OBLICUA', 'SWIMMERS')
)
def test_views_in_other_words_than_the_standards_are_known(view):
    with pytest.raises(UnsupportedDicom, match='lateral'):
        decode(to_dicom(stored(8, False), ViewPosition=view))


@pytest.mark.parametrize(
    'element',
    [
        dict(BodyPartExamined='Doe^Jane'),  # Unknown words are not judged
        dict(BodyPartExamined='CHEST ABDOMEN'),
        dict(ViewPosition='AP_BILATERAL'),
        dict(ViewPosition='AP FLAT'),
        dict(ViewPosition='POSTEROANTERIOR'),
        dict(PresentationIntentType='FOR PRESENTATION'),
        dict(PixelAspectRatio=[1, 1], PixelSpacing=[0.143, 0.14], ImagerPixelSpacing=None),
        dict(PatientOrientation=['L', 'F']),
        dict(PatientOrientation=['R', 'F']),  # As viewers, which show a mirrored image mirrored
    ],
    ids=str,
)
def test_usual_headers_are_read(element):
    a = stored(12, False)
    assert (
        decode(to_dicom(a, BitsStored=12, **element)) == decode(to_dicom(a, BitsStored=12))
    ).all()


def test_dicom_without_preamble_or_transfer_syntax():
    whole = to_dicom(stored(8, False))
    with pytest.raises(UnsupportedDicom, match='without preamble'):
        decode(whole[whole.index(b'\x08\x00\x16\x00') :])
    at = whole.index(b'\x02\x00\x10\x00UI')
    with pytest.raises(ImageError):
        decode(whole[:at] + whole[at + 8 + whole[at + 6] :])


# --- One image, and no more ---


@pytest.mark.parametrize('syntax', SYNTAXES[:6])
@pytest.mark.parametrize('start', ('preamble', 'file meta', 'data set'))
def test_joined_files_are_rejected(syntax, start):
    a = stored(12, False)
    film = in_syntax(a, syntax, 12)
    other = in_syntax(a[:40, :40].copy(), syntax, 12)
    is_big_endian = syntax == uid.ExplicitVRBigEndian
    class_uid = b'\x00\x08\x00\x16' if is_big_endian else b'\x08\x00\x16\x00'
    at = dict(preamble=0, **{'file meta': 132, 'data set': other.index(class_uid)})[start]
    with pytest.raises(ImageError, match='joined'):
        decode(film + other[at:])


def test_an_element_that_comes_twice_is_rejected():
    content = to_dicom(stored(8, False))
    at = content.index(b'\x28\x00\x10\x00')  # Rows
    with pytest.raises(UnsupportedDicom, match='twice'):
        decode(content[:at] + content[at : at + 10] + content[at:])


def test_padding_and_signatures_after_the_pixels_are_passed_over():
    content = to_dicom(stored(8, False))
    padding = struct.pack('<HH2sHI', 0xFFFC, 0xFFFC, b'OB', 0, 6) + b'filler'
    for end in (bytes(1), bytes(500), padding):
        assert (decode(content + end) == decode(content)).all()


@pytest.mark.parametrize('offsets', (False, True))
@pytest.mark.parametrize(
    'syntax', (uid.JPEGBaseline8Bit, uid.JPEG2000Lossless, uid.JPEGLSLossless, uid.RLELossless)
)
def test_several_compressed_frames_are_rejected_whatever_the_header_says(syntax, offsets):
    a = stored(8, False)
    if syntax == uid.JPEGBaseline8Bit:
        frames = [jpeg(a), jpeg(a[::-1].copy())]
    else:
        films = [to_dicom(each, syntax) for each in (a, a[::-1].copy())]
        pixels = [pydicom.dcmread(io.BytesIO(film)).PixelData for film in films]
        frames = [next(generate_frames(each, number_of_frames=1)) for each in pixels]
    ds = pydicom.dcmread(io.BytesIO(encapsulated(a, syntax, frames[0])))
    for count in (None, 1):
        ds.NumberOfFrames = count
        ds.PixelData = encapsulate(frames, has_bot=offsets)
        ds.save_as(buffer := io.BytesIO(), enforce_file_format=True)
        with pytest.raises(UnsupportedDicom, match='several frames'):
            decode(buffer.getvalue())
    ds.PixelData = encapsulate(
        frames[:1], fragments_per_frame=1 if syntax == uid.RLELossless else 3
    )
    ds.save_as(buffer := io.BytesIO(), enforce_file_format=True)
    assert (decode(buffer.getvalue()) == decode(encapsulated(a, syntax, frames[0]))).all()


def test_a_jpeg_of_eight_bits_under_a_header_of_twelve_is_rejected():
    a = stored(8, False)
    window = dict(WindowCenter=2048, WindowWidth=4096)
    film = encapsulated(a.astype(np.uint16), uid.JPEGBaseline8Bit, jpeg(a), BitsStored=12, **window)
    with pytest.raises(ImageError, match='do not fit'):
        decode(film)


# --- PNG and JPEG ---


def test_png_of_every_kind():
    a = stored(8, False)
    rgba = np.dstack([a, a, a, np.full_like(a, 255)])
    palette = Image.fromarray(a).convert('P')
    palette.save(buffer := io.BytesIO(), 'PNG')
    for content in (
        png(a),
        png(np.dstack([a] * 3)),
        png(rgba),
        png(np.dstack([a, np.full_like(a, 255)])),
        buffer.getvalue(),
    ):
        assert np.abs(decode(content).astype(int) - a).max() <= 1
    assert decode(png(a > 100)).max() == 255


def test_sixteen_bit_png_keeps_the_levels_that_eight_bits_can_hold():
    a = stored(12, False)
    got = decode(png(a))
    assert len(np.unique(got)) > 240
    assert np.abs(got - 255.0 * (a - a.min()) / (a.max() - a.min())).max() <= 0.5001


def test_sixteen_bit_colour_png_is_rejected():
    content = bytearray(png(np.dstack([stored(8, False)] * 3)))
    content[24] = 16
    content[29:33] = struct.pack('>I', zlib.crc32(bytes(content[12:29])))
    with pytest.raises(UnsupportedFormat, match='16 bits and colour'):
        decode(bytes(content))


def test_sixteen_bit_grey_png_with_a_transparent_value_is_rejected():
    a = stored(16, False)
    a[:10] = 65535
    buffer = io.BytesIO()
    Image.fromarray(a).save(buffer, 'PNG', transparency=65535)
    assert b'tRNS' in buffer.getvalue()
    with pytest.raises(UnsupportedFormat, match='transparency'):
        decode(buffer.getvalue())


@pytest.mark.parametrize('kind', ('L', 'RGB', 'DICOM'))
def test_a_progressive_jpeg_that_lacks_scans_is_rejected(kind):
    a = stored(8, False)
    image = Image.fromarray(a).convert('RGB' if kind == 'RGB' else 'L')
    content = saved(image, 'JPEG', progressive=True)

    def in_file(stream):
        return encapsulated(a, uid.JPEGBaseline8Bit, stream) if kind == 'DICOM' else stream

    starts = [start for marker, start, _ in jpeg_segments(content) if marker == 0xDA]
    tables = [content.rindex(b'\xff\xc4', 0, start) for start in starts]
    assert len(starts) > 4
    for at in (*tables[1:], tables[-1] + 2, tables[-1] + 9):
        with pytest.raises(CorruptImage):
            decode(in_file(content[:at] + b'\xff\xd9'))
    decode(in_file(content))


def rows_of_png(content, change):
    "A PNG whose unpacked rows are changed; its checksums are right"
    parts = {}
    for name, start, stop in _chunks(content):
        parts[name] = parts.get(name, b'') + content[start + 8 : stop - 4]
    parts[b'IDAT'] = zlib.compress(change(zlib.decompress(parts[b'IDAT'])))
    chunks = [
        struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
        for name, data in parts.items()
    ]
    return content[:8] + b''.join(chunks)


@pytest.mark.parametrize('mode', ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'I;16'))
@pytest.mark.parametrize('size', ((56, 48), (33, 17)))
def test_a_png_with_fewer_rows_than_it_announces_is_rejected(mode, size):
    image = Image.fromarray(stored(8, False)).resize(size)
    if mode == 'I;16':
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 16)
    else:
        image = image.convert(mode)
    content = saved(image, 'PNG')
    same = rows_of_png(content, lambda rows: rows)
    assert (decode(same) == decode(content)).all()
    for change in (lambda rows: rows[: len(rows) // 2], lambda rows: rows[:-1], lambda rows: b''):
        with pytest.raises(CorruptImage, match='truncated or damaged'):
            decode(rows_of_png(content, change))


@pytest.mark.parametrize('size', ((56, 48), (33, 17), (17, 18)))
def test_rows_of_an_interlaced_png_are_counted(size):
    width, height = size
    pixels = np.asarray(Image.fromarray(stored(8, False)).resize(size))
    passes = [pixels[y::dy, x::dx] for x, y, dx, dy in _INTERLACED]
    rows = b''.join(b'\0' + row.tobytes() for part in passes for row in part if len(row))
    plain = saved(Image.fromarray(pixels), 'PNG')
    header = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 1)
    chunk = b'IHDR' + header
    start = plain[:8] + struct.pack('>I', 13) + chunk + struct.pack('>I', zlib.crc32(chunk))
    interlaced = rows_of_png(start + plain[33:], lambda _: rows)
    assert (decode(interlaced) == pixels).all()
    with pytest.raises(CorruptImage):
        decode(rows_of_png(interlaced, lambda rows: rows[:-1]))


def test_exif_orientation_turns_to_the_right():
    a = stored(8, False)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(jpeg(a, exif=exif)).shape == (W, H)
    assert np.abs(decode(jpeg(a, exif=exif, quality=98)).astype(int) - np.rot90(a, -1)).max() < 25


def saved(image, format, **how):
    image.save(buffer := io.BytesIO(), format, **how)
    return buffer.getvalue()


def unusual():
    "Files that hold something else than a single greyscale image, and the error of each"
    grey = Image.fromarray(stored(8, False))
    others = dict(save_all=True, append_images=[grey.rotate(5)])
    return {
        'animated PNG': (
            saved(grey, 'PNG', **others),
            'This PNG is animated: it holds several images.',
        ),
        'several images in a JPEG': (
            saved(grey, 'MPO', **others),
            'This JPEG holds several images.',
        ),
        'CMYK': (saved(grey.convert('CMYK'), 'JPEG'), 'This JPEG is in CMYK'),
        'DICOM of several frames': (
            to_dicom(stored(8, False), NumberOfFrames=2),
            'it has several frames',
        ),
        'GIF': (saved(grey, 'GIF'), 'This is neither JPEG nor PNG nor DICOM'),
    }


@pytest.fixture(scope='module')
def predictor(tmp_path_factory):
    pytest.importorskip('onnxruntime')
    from cxr_study.serve.bundle import example_bundle
    from cxr_study.serve.predictor import Predictor

    return Predictor(example_bundle(tmp_path_factory.mktemp('bundle') / 'bundle'))


@pytest.mark.parametrize('kind', unusual())
def test_training_and_service_reject_the_same_with_the_same_message(kind, predictor):
    content, expected = unusual()[kind]
    messages = []
    for use in (decode, Preprocess(32), predictor):
        with pytest.raises(ImageError) as rejected:
            use(content)
        messages.append(str(rejected.value))
    assert expected in messages[0]
    assert len(set(messages)) == 1


def test_a_single_image_in_an_animation_is_read(predictor):
    grey = Image.fromarray(stored(8, False))
    content = saved(grey, 'PNG', save_all=True)
    assert (decode(content) == stored(8, False)).all()
    assert predictor(content)['image']['format'] == 'PNG'


@pytest.mark.parametrize(
    'how', [dict(), dict(subsampling=0), dict(progressive=True), dict(keep_rgb=True)], ids=str
)
def test_grey_levels_of_colour_jpegs_are_those_that_the_decoder_gives(how):
    a = stored(8, False)
    content = saved(Image.fromarray(np.dstack([a, a // 2, 255 - a])), 'JPEG', quality=95, **how)
    by_pillow = Image.open(io.BytesIO(content))
    by_pillow.draft('L', by_pillow.size)
    image = read_image(content)
    assert (image.grey == np.asarray(by_pillow.convert('L'))).all()
    assert image.colourfulness() > 50


def test_colourfulness_of_grey_files_is_nearly_zero():
    a = stored(8, False)
    assert read_image(jpeg(a)).colourfulness() == 0
    assert 0 <= read_image(jpeg(np.dstack([a] * 3))).colourfulness() < 2


def test_a_file_is_opened_once(monkeypatch, predictor):
    opened, real = [], Image.open
    monkeypatch.setattr(
        Image, 'open', lambda *args, **kwargs: opened.append(1) or real(*args, **kwargs)
    )
    predictor(jpeg(np.dstack([stored(8, False)] * 3)))
    assert len(opened) == 1


def test_preprocess_has_the_defaults_of_the_stage():
    from cxr_study.data.sets import ImageSet

    stage = defaults('01_data')
    assert Preprocess() == Preprocess(
        ImageSet.default_size, stage['geometry'], standardise=stage['standardise']
    )


@pytest.mark.parametrize('keep', (0.02, 0.3, 0.9))
@pytest.mark.parametrize('progressive', (False, True))
def test_truncated_jpegs_are_errors(keep, progressive):
    whole = jpeg(stored(8, False), progressive=progressive)
    with pytest.raises(CorruptImage):
        decode(whole[: int(len(whole) * keep)])
    with pytest.raises(CorruptImage):
        decode(whole[: int(len(whole) * keep)], at_least=8)


def test_reduced_decoding_is_never_smaller_than_set_and_close():
    y, x = np.mgrid[:1000, :1300]
    a = ((np.sin(x / 90) + np.cos(y / 70) + 2) * 63).astype(np.uint8)
    for size in (60, 130, 224, 999, 2000):
        assert min(decode(jpeg(a), at_least=size).shape) >= min(size, 1000)
    full = resize(decode(jpeg(a)), 224)
    assert np.abs(Preprocess(224)(jpeg(a)).astype(int) - full).max() <= 4


def cast(h, w, seed=0):
    "An image without black, so that black is a bar"
    rng = np.random.default_rng(seed)
    return rng.integers(40, 256, (h, w)).astype(np.uint8)


@pytest.mark.parametrize('h, w', [(60, 90), (90, 60), (64, 64), (1, 300), (300, 1), (31, 32)])
@pytest.mark.parametrize('antialias', (True, False))
def test_a_letterbox_holds_the_whole_image_in_its_shape(h, w, antialias):
    size = 48
    square = resize(cast(h, w), size, 'letterbox', antialias)
    assert square.shape == (size, size) and square.dtype == np.uint8
    rows = np.flatnonzero(square.any(1))
    columns = np.flatnonzero(square.any(0))
    inner = square[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    longer = max(h, w)
    assert inner.shape == (max(1, round(size * h / longer)), max(1, round(size * w / longer)))
    assert inner.min() >= 40
    for first, last in ((rows[0], rows[-1]), (columns[0], columns[-1])):
        assert abs(first - (size - 1 - last)) <= 1
    if antialias:
        reference = Image.fromarray(cast(h, w)).resize(inner.shape[::-1], Image.BILINEAR)
        assert (inner == np.asarray(reference)).all()


@pytest.mark.parametrize('geometry', ('squish', 'crop', 'letterbox'))
def test_every_geometry_leaves_a_square_as_it_is_and_is_written_as_json(geometry):
    square = cast(40, 40)
    assert (resize(square, 40, geometry) == square).all()
    spec = Preprocess(40, geometry)
    assert Preprocess.from_dict(spec.to_dict()) == spec
    assert (spec(png(cast(50, 80))) == resize(cast(50, 80), 40, geometry)).all()


# --- The spec ---


def test_arrays_and_tensors_are_standardised_alike():
    torch = pytest.importorskip('torch')
    x = np.random.default_rng(0).random((3, 1, 20, 20)).astype(np.float32)
    for how in ('image', 'imagenet'):
        spec = Preprocess(20, standardise=how)
        assert np.abs(spec.normalise(torch.tensor(x)).numpy() - spec.normalise(x)).max() < 1e-5


@pytest.mark.parametrize(
    'bad',
    [dict(size=4), dict(size='64'), dict(geometry='x'), dict(standardise='x'), dict(colour=1)],
)
def test_bad_specs_are_rejected(bad):
    with pytest.raises(ImageError):
        Preprocess.from_dict(bad)


def test_bytes_and_path_give_the_same(tmp_path):
    content = png(stored(8, False))
    path = tmp_path / 'a.bin'
    path.write_bytes(content)
    assert (decode(path) == decode(content)).all()
    assert (decode(str(path)) == decode(content)).all()


# --- Attacks ---


def forged(kind):
    if kind == 'png':
        return png(np.zeros((20000, 20000), bool))
    if kind == 'jpeg':
        content = bytearray(jpeg(stored(8, False)))
        at = content.index(b'\xff\xc0')
        content[at + 5 : at + 9] = struct.pack('>2H', 60000, 60000)
        return bytes(content)
    if kind == 'dicom':
        return to_dicom(stored(8, False), Rows=60000, Columns=60000)
    content = bytearray(to_dicom(stored(16, False), uid.JPEG2000Lossless))
    at = content.index(b'\xff\x4f\xff\x51')
    content[at + 8 : at + 16] = struct.pack('>2I', 60000, 60000)
    return bytes(content)


@pytest.mark.parametrize('kind', ('png', 'jpeg', 'dicom', 'jpeg 2000 in dicom'))
def test_bombs_are_rejected_before_they_are_decoded(kind):
    content = forged(kind)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.time()
    with pytest.raises((TooLarge, CorruptImage)):
        decode(content)
    assert time.time() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@functools.cache
def strip(kind, height, width):
    "A file of an image of this size"
    if kind == 'dicom':
        return to_dicom(np.zeros((height, width), np.uint8))
    if kind == 'jpeg':
        return jpeg(np.zeros((height, width), np.uint8))
    return png(np.zeros((height, width), np.uint8))


@pytest.fixture(scope='module')
def decoders():
    with Decoders(1) as found:
        yield found


STRIPS = ((1, 40_000), (40_000, 1), (15, 15), (20, 121), (121, 20), (100, 9000))


@pytest.mark.parametrize('size', STRIPS)
@pytest.mark.parametrize('kind', ('png', 'jpeg', 'dicom'))
def test_what_cannot_be_a_film_is_refused_everywhere_with_a_sentence(
    tmp_path, decoders, kind, size
):
    content = strip(kind, *size)
    for read in (decode, read_image, dimensions):
        with pytest.raises(WrongShape, match='Send the whole image'):
            read(content)
    with pytest.raises(WrongShape, match='Send the whole image'):
        decoders.prepare(content, Preprocess(32))
    for name in ('NORMAL', 'PNEUMONIA'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'film.png').write_bytes(strip('png', 40, 40))
    (tmp_path / 'NORMAL' / f'strip.{kind}').write_bytes(content)
    with pytest.raises(StudyError, match='Send the whole image'):
        decoded(load_dataset(str(tmp_path)), Preprocess(32), tmp_path / 'cache')


def test_a_strip_of_40_megapixels_is_refused_before_it_is_decoded():
    start = time.process_time()
    with pytest.raises(WrongShape):
        decode(strip('png', 1, 40_000_000))
    assert time.process_time() - start < 1


@pytest.mark.parametrize('size', ((28, 28), (16, 96), (96, 16), (50, 169)))
@pytest.mark.parametrize('kind', ('png', 'jpeg', 'dicom'))
def test_small_and_wide_films_are_read(kind, size):
    assert decode(strip(kind, *size)).shape == size


def test_deflated_dicom_is_rejected():
    with pytest.raises(UnsupportedDicom, match='deflated'):
        decode(to_dicom(np.zeros((2000, 2000), np.uint8), uid.DeflatedExplicitVRLittleEndian))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / 'film.png')
    (tmp_path / 'link.png').symlink_to(tmp_path / 'film.png')
    for path in (tmp_path / 'film.png', tmp_path / 'link.png', Path('/dev/zero')):
        with pytest.raises(ImageError, match='pipe or a device'):
            decode(path)


def test_too_many_bytes(tmp_path):
    (tmp_path / 'big').write_bytes(bytes(2000))
    for source in (bytes(2000), tmp_path / 'big'):
        with pytest.raises(TooLarge):
            decode(source, limits=Limits(max_bytes=1000))


def mutations(seeds, n, rng):
    "`n` damaged copies: cut off, bytes changed, removed, inserted, or the header overwritten with extreme values"
    for i in range(n):
        content, kind = bytearray(seeds[i % len(seeds)]), rng.integers(5)
        at, count = int(rng.integers(len(content))), int(rng.integers(1, 64))
        if kind == 0:
            content = content[:at]
        elif kind == 1:
            content[at : at + count] = rng.bytes(min(count, len(content) - at))
        elif kind == 2:
            del content[at : at + count]
        elif kind == 3:
            content[at:at] = rng.bytes(count)
        else:
            for p in rng.integers(0, min(700, len(content)), 4):
                content[p] = rng.choice([0, 1, 127, 128, 254, 255])
        yield bytes(content)


def test_three_thousand_damaged_files_give_only_typed_errors():
    small, deep = stored(8, False), stored(12, False)
    seeds = [
        jpeg(small),
        jpeg(np.dstack([small] * 3), progressive=True),
        png(small),
        png(deep),
        png(np.dstack([small] * 4)),
        to_dicom(small),
        to_dicom(deep, BitsStored=12, **elements(recipes(12, False)['VOI LUT'])),
        to_dicom(deep, uid.JPEG2000Lossless, BitsStored=12),
        to_dicom(deep, uid.RLELossless, BitsStored=12),
        in_syntax(deep, uid.JPEGLosslessSV1, 12),
        encapsulated(small, uid.JPEGBaseline8Bit, jpeg(small)),
    ]
    counts = dict(decoded=0, rejected=0)
    peak = []
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for i, content in enumerate(mutations(seeds, 3_000, np.random.default_rng(0))):
            try:
                decode(content)
                counts['decoded'] += 1
            except ImageError:
                counts['rejected'] += 1
            if i in (1000, 2999):
                peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert counts['decoded'] > 200 and counts['rejected'] > 1000
    assert peak[1] - peak[0] < 50_000, "kilobytes of growth over 2,000 inputs"


def test_dimensions_agree_with_decoding():
    for content in (
        jpeg(stored(8, False)),
        png(stored(16, False)),
        to_dicom(stored(12, False), BitsStored=12),
    ):
        assert dimensions(content) == decode(content).shape == (H, W)


# --- Headers that lie ---

BAD_NUMBERS = [float('nan'), float('inf'), -float('inf'), 1e30]


@pytest.mark.parametrize('bad', BAD_NUMBERS)
@pytest.mark.parametrize(
    'name', ('WindowCenter', 'WindowWidth', 'RescaleSlope', 'RescaleIntercept')
)
def test_numbers_that_are_not_finite_are_rejected(name, bad):
    header = dict(WindowCenter=2000, WindowWidth=900, RescaleSlope=1, RescaleIntercept=0)
    ds = pydicom.dcmread(io.BytesIO(to_dicom(stored(12, False), BitsStored=12, **header)))
    del ds[name]
    ds.add_new(name, 'FD', bad)
    ds.save_as(buffer := io.BytesIO())
    with pytest.raises(UnsupportedDicom, match=f'{name}.* not valid'):
        decode(buffer.getvalue())


@pytest.mark.parametrize('text', (b'nan ', b'-inf', b'1e99', b'wide'))
def test_numbers_as_text_are_checked_alike(text):
    content = to_dicom(stored(12, False), BitsStored=12, WindowCenter=2000, WindowWidth=1234)
    assert content.count(b'1234') == 1
    with pytest.raises(UnsupportedDicom, match='WindowWidth.* not valid'):
        decode(content.replace(b'1234', text))


SIZES = ('Rows', 'Columns', 'BitsAllocated', 'BitsStored', 'HighBit', 'PixelRepresentation')


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.sampled_from(SIZES), st.lists(st.integers(0, 65535), min_size=2, max_size=2000))
def test_elements_that_decide_sizes_hold_one_number(name, values):
    content = to_dicom(stored(12, False), BitsStored=12)
    ds = pydicom.dcmread(io.BytesIO(content))
    setattr(ds, name, values)
    ds.save_as(buffer := io.BytesIO())
    with pytest.raises(UnsupportedDicom, match=f'{name} is not a whole number'):
        decode(buffer.getvalue())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(SIZES), st.integers(0, 65535))
def test_another_size_than_the_pixels_have_is_rejected(name, value):
    ds = pydicom.dcmread(io.BytesIO(to_dicom(stored(16, False))))
    is_lie = ds[name].value != value
    setattr(ds, name, value)
    ds.save_as(buffer := io.BytesIO())
    if not is_lie or (name == 'PixelRepresentation' and value == 1):
        return
    if name == 'BitsStored' and value <= 16:
        return  # HighBit 15 with fewer bits: shifted
    with pytest.raises(ImageError):
        decode(buffer.getvalue())


def test_compressed_pixels_with_a_strange_high_bit_are_rejected():
    with pytest.raises(UnsupportedDicom, match='HighBit'):
        decode(to_dicom(stored(12, False), uid.JPEG2000Lossless, BitsStored=12, HighBit=15))


def test_padding_outside_the_stored_bits_and_a_range_of_padding():
    a = stored(12, False)
    plain = decode(to_dicom(a[7:], BitsStored=12))
    outside = a.copy()
    outside[:7] = 65535
    in_a_range = np.clip(a, 0, 3900)
    in_a_range[:7] = 3995
    for words, header in (
        (outside, dict(PixelPaddingValue=65535)),
        (in_a_range, dict(PixelPaddingValue=4000, PixelPaddingRangeLimit=3990)),
    ):
        grey = decode(to_dicom(words, BitsStored=12, **header))
        assert (grey[:7] == 0).all()
        expected = plain if words is outside else decode(to_dicom(words[7:], BitsStored=12))
        assert (grey[7:] == expected).all()
    with pytest.raises(UnsupportedDicom, match='All of its pixels are padding'):
        decode(to_dicom(np.full((16, 16), 7, np.uint16), PixelPaddingValue=7))


@pytest.mark.parametrize(
    'descriptor,entries',
    [
        ([4096, 0, 12], np.arange(4000)),
        ([4096, 0, 40], np.arange(4096)),
        ([4096, 0], np.arange(4096)),
        ([4096, 0, 12], np.zeros(4096)),
        ([4096, 0, 12], None),
    ],
    ids=('too short', 'too many bits', 'no bits', 'black', 'no entries'),
)
def test_a_voi_lut_that_cannot_be_used_is_rejected(descriptor, entries):
    table = pydicom.Dataset()
    table.add_new('LUTDescriptor', 'US', descriptor)
    if entries is not None:
        table.add_new('LUTData', 'OW', entries.astype('<u2').tobytes())
    with pytest.raises(ImageError):
        decode(to_dicom(stored(12, False), BitsStored=12, VOILUTSequence=[table]))


def test_presentation_lut_of_another_kind_is_rejected():
    for header in (
        dict(PresentationLUTShape='LIN OD'),
        dict(PresentationLUTSequence=lut(2, 0, 8, [0, 9])),
    ):
        with pytest.raises(UnsupportedDicom, match='presentation lookup table'):
            decode(to_dicom(stored(8, False), **header))


def seconds_and_megabytes(content):
    "What an `ImageError` costs"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with pytest.raises(ImageError):
        decode(content)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return time.process_time() - start, grown / 1024


def hostile():
    "Files that cost little to send and much to read"
    small = to_dicom(stored(8, False))
    element = struct.pack('<HH2sH', 0x0009, 0x1001, b'UL', 0)
    item = struct.pack('<HHI', 0xFFFE, 0xE000, 0)
    end = struct.pack('<HHI', 0xFFFE, 0xE0DD, 0)
    open_sequence = struct.pack('<HH2sHI', 0x0054, 0x0220, b'SQ', 0, 0xFFFFFFFF)
    at = small.index(struct.pack('<HH2s', 0x0028, 0x0002, b'US'))
    views = open_sequence + 1_000_000 * item + end
    picture = jpeg(stored(8, False))
    scan = picture[picture.index(b'\xff\xda') : -2]
    return {
        'many elements': small[:at] + 3_000_000 * element + small[at:],
        'many items': small[:at] + views + small[at:],
        'a long number': to_dicom(stored(8, False), NumberOfFrames='1').replace(
            b'IS\x02\x001 ', b'IS\xfe\xff' + 32767 * b'1\\'
        ),
        'many chunks': png(stored(8, False))[:-12] + 6_000_000 * b'\0\0\0\0aaAa\0\0\0\0',
        'many scans': picture[:-2] + 20_000 * scan + b'\xff\xd9',
    }


@pytest.mark.parametrize('kind', hostile())
def test_hostile_headers_cost_little(kind):
    seconds, megabytes = seconds_and_megabytes(hostile()[kind])
    assert seconds < 3 and megabytes < 200


@pytest.mark.parametrize(
    'change', [dict(components=2), dict(tile=1), dict(step=2), dict(precision=30)], ids=str
)
def test_jpeg_2000_is_checked_before_it_is_decoded(change):
    content = bytearray(to_dicom(stored(12, False), uid.JPEG2000Lossless, BitsStored=12))
    at = content.index(b'\xff\x4f\xff\x51')
    offset, value = {
        'components': (40, struct.pack('>H', 2)),
        'tile': (24, struct.pack('>2I', 1, 1)),
        'step': (43, b'\2'),
        'precision': (42, b'\x1d'),
    }[next(iter(change))]
    content[at + offset : at + offset + len(value)] = value
    if change == dict(tile=1):
        content = content.replace(struct.pack('>2I', W, H), struct.pack('>2I', 5 * W, 5 * H), 1)
    with pytest.raises(CorruptImage, match='do not fit'):
        decode(bytes(content))


def test_a_jp2_box_without_length_does_not_stop_the_reader():
    a = stored(12, False)
    ds = pydicom.dcmread(io.BytesIO(to_dicom(a, uid.JPEG2000Lossless, BitsStored=12)))
    stream = next(generate_frames(ds.PixelData, number_of_frames=1))
    boxes = b'\0\0\0\x0cjP  \r\n\x87\n' + b'\0\0\0\0jp2h'
    content = encapsulated(a, uid.JPEG2000Lossless, boxes + stream, BitsStored=12)
    assert (decode(content) == decode(to_dicom(a, BitsStored=12))).all()


# --- Damaged pixels ---


def jpeg_of_12_bits(rows, columns):
    "A sequential JPEG of 12 bits with so many rows and columns of blocks of 8 x 8, by a minimal encoder"
    rng = np.random.default_rng(0)
    code = ''
    before = 0
    for _ in range(rows * columns):
        level = int(rng.integers(-900, 900))
        size = abs(level - before).bit_length()
        bits = level - before if level > before else level - before + 2**size - 1
        code += f'{size:04b}' + (f'{bits:0{size}b}' if size else '')
        before = level
        for symbol, extra in ((1, '1'), (2, '0'), (1, '0'))[: rng.integers(4)]:
            code += f'{symbol:02b}{extra}'  # 01: size 1; 10: 16 zeros, which has no extra bit
            code = code[:-1] if symbol == 2 else code
        code += '00'
    code += '1' * (-len(code) % 8)
    body = int(code, 2).to_bytes(len(code) // 8).replace(b'\xff', b'\xff\x00')

    def segment(marker, content):
        return b'\xff' + bytes([marker]) + struct.pack('>H', len(content) + 2) + content

    levels = bytes([0, 0, 0, 0, 15, *bytes(12), *range(15)])
    others = bytes([0x10, 0, 3, *bytes(14), 0x00, 0x01, 0xF0])
    return (
        b'\xff\xd8'
        + segment(0xDB, bytes([0]) + bytes([8]) * 64)
        + segment(0xC1, struct.pack('>BHHB3B', 12, 8 * rows, 8 * columns, 1, 1, 0x11, 0))
        + segment(0xC4, levels)
        + segment(0xC4, others)
        + segment(0xDA, bytes([1, 1, 0, 0, 63, 0]))
        + body
        + b'\xff\xd9'
    )


def film_like():
    "A larger picture, whose JPEG has many small blocks as a film's has"
    y, x = np.mgrid[:320, :400]
    noise = np.random.default_rng(0).normal(0, 6, x.shape)
    return (110 + 60 * np.sin(x / 40) * np.cos(y / 50) + noise).clip(0, 255).astype(np.uint8)


@functools.cache
def compressed(kind):
    "(stream, a function from a stream to a file) of a kind of compression"
    if kind == 'JPEG':
        return jpeg(film_like()), bytes
    if kind == 'baseline':
        wrap = functools.partial(encapsulated, film_like(), uid.JPEGBaseline8Bit)
        return jpeg(film_like()), wrap
    if kind == 'extended':
        rows, columns = 40, 50
        a = np.zeros((8 * rows, 8 * columns), np.uint16)
        wrap = functools.partial(encapsulated, a, uid.JPEGExtended12Bit, BitsStored=12)
        return jpeg_of_12_bits(rows, columns), wrap
    a = stored(12, False)
    if kind == 'lossless':
        stream, syntax = lossless_jpeg(a, 12), uid.JPEGLosslessSV1
    else:
        syntax = dict(ls=uid.JPEGLSLossless, j2k=uid.JPEG2000Lossless, rle=uid.RLELossless)[kind]
        ds = pydicom.dcmread(io.BytesIO(to_dicom(a, syntax, BitsStored=12)))
        stream = next(generate_frames(ds.PixelData, number_of_frames=1))
    return stream, functools.partial(encapsulated, a, syntax, BitsStored=12)


KINDS = ('JPEG', 'baseline', 'extended', 'lossless', 'ls', 'rle', 'j2k')


def damaged(kind, rng):
    "Four damaged copies of a stream: cut off, closed with an end marker, with bytes taken out, overwritten"
    stream, _ = compressed(kind)
    end = b'' if kind == 'rle' else b'\xff\xd9'
    body = stream.rstrip(b'\0').removesuffix(end)
    first = {'rle': 64, 'j2k': 200}.get(kind) or body.rindex(b'\xff\xda') + 12
    at = int(first + rng.uniform(0.05, 0.8) * (len(body) - first))
    size = int(rng.integers(400, 700))
    fill = bytes([rng.choice([0, 0x55, 0xFE])])
    yield body[:at]
    yield body[:at] + end
    yield body[:at] + body[at + size :] + end
    yield body[:at] + fill * size + body[at + size :] + end


@pytest.mark.parametrize('kind', KINDS)
def test_pixels_that_end_early_or_have_a_hole_are_rejected(kind):
    stream, wrap = compressed(kind)
    decode(wrap(stream))
    rng = np.random.default_rng(1)
    for _ in range(8):
        for content in damaged(kind, rng):
            with pytest.raises(ImageError):
                decode(wrap(content))


@pytest.mark.parametrize('kind', ['lossless', 'ls', 'extended'])
def test_a_whole_jpeg_of_an_unusual_encoding_is_not_called_damaged(kind):
    stream, _ = compressed(kind)
    with pytest.raises(UnsupportedFormat, match='lossless, JPEG-LS or has more than 8 bits'):
        decode(stream)


@pytest.mark.parametrize('filler', [b'\0', b'\xff', b'\xff\xff\xff', bytes(1000)])
@pytest.mark.parametrize('kind', [kind for kind in KINDS if kind != 'rle'])
def test_bytes_that_fill_up_a_frame_after_its_end_do_not_matter(kind, filler):
    stream, wrap = compressed(kind)
    stream = stream.rstrip(b'\0')
    assert (decode(wrap(stream + filler)) == decode(wrap(stream))).all()


def test_restart_intervals_of_a_lossless_jpeg_are_checked_one_by_one():
    a = stored(12, False)
    top, bottom = lossless_jpeg(a[:24], 12), lossless_jpeg(a[24:], 12)
    head, start = top.index(b'\xff\xc4'), top.index(b'\xff\xda') + 10
    interval = b'\xff\xdd' + struct.pack('>HH', 4, 24 * W)
    size = top[:head].replace(struct.pack('>2H', 24, W), struct.pack('>2H', H, W))
    second = bottom[bottom.index(b'\xff\xda') + 10 : -2]
    stream = size + interval + top[head:-2] + b'\xff\xd0' + second + b'\xff\xd9'
    content = encapsulated(a, uid.JPEGLosslessSV1, stream, BitsStored=12)
    assert (decode(content) == decode(to_dicom(a, BitsStored=12))).all()
    cut = stream[: start + 300] + stream[start + 400 :]
    with pytest.raises(CorruptImage, match='end early'):
        decode(encapsulated(a, uid.JPEGLosslessSV1, cut, BitsStored=12))


ENCODINGS = (uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian)


def meta_bytes(content):
    "Bytes of a DICOM file before its data set"
    return 144 + struct.unpack('<I', content[140:144])[0]


@pytest.mark.parametrize('announced', ENCODINGS)
@pytest.mark.parametrize('written', ENCODINGS)
def test_a_data_set_is_not_written_in_another_way_than_announced(written, announced):
    a = stored(12, False)
    content, other = to_dicom(a, written, BitsStored=12), to_dicom(a, announced, BitsStored=12)
    mixed = other[: meta_bytes(other)] + content[meta_bytes(content) :]
    with warnings.catch_warnings():
        warnings.simplefilter('error' if written == announced else 'ignore')
        if written == announced:
            assert (decode(mixed) == decode(content)).all()
            return
        with pytest.raises((CorruptImage, UnsupportedDicom)):
            decode(mixed)
        with pytest.raises((CorruptImage, UnsupportedDicom)):
            dimensions(mixed)


def test_a_command_with_value_representations_is_refused():
    content = to_dicom(stored(8, False))
    at = meta_bytes(content)
    command = struct.pack('<HH2sHH', 0, 0x0100, b'US', 2, 1)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(CorruptImage, match='explicit value representations'):
            decode(content[:at] + command + content[at:])


@pytest.mark.parametrize('name', ['Rows', 'WindowCenter', 'PixelData'])
def test_an_element_without_value_representation_is_refused(name):
    "pydicom takes an element of an explicit file for an implicit one without a warning"
    a = stored(8, False)
    content = to_dicom(a, WindowCenter=100, WindowWidth=50)
    element = pydicom.dcmread(io.BytesIO(content))[name]
    head = struct.pack('<HH', element.tag.group, element.tag.elem)
    at = content.index(head + element.VR.encode(), meta_bytes(content))
    long = element.VR in ('OB', 'OW')
    length = content[at + 8 : at + 12] if long else content[at + 6 : at + 8] + b'\0\0'
    implicit = content[:at] + head + length + content[at + (12 if long else 8) :]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(CorruptImage, match='implicit value representations'):
            decode(implicit)


HEADER = (
    *('Modality', 'ViewPosition', 'PatientOrientation', 'PresentationLUTShape', 'VOILUTFunction'),
    *('BodyPartExamined', 'PresentationIntentType', 'PixelAspectRatio', 'ImagerPixelSpacing'),
    *('Rows', 'Columns', 'NumberOfFrames', 'SamplesPerPixel', 'PhotometricInterpretation'),
    *('BitsAllocated', 'BitsStored', 'HighBit', 'PixelRepresentation', 'PlanarConfiguration'),
    *('WindowCenter', 'WindowWidth', 'RescaleSlope', 'RescaleIntercept'),
    *('PixelPaddingValue', 'PixelPaddingRangeLimit', 'SpecificCharacterSet'),
    *('ModalityLUTSequence', 'VOILUTSequence', 'ViewCodeSequence', 'PixelData'),
)
NUMBERS = st.one_of(
    st.integers(-(2**33), 2**33).map(str),
    st.floats(width=32).map(str),
    st.lists(st.integers(-300, 70000), max_size=3).map(lambda xs: '\\'.join(map(str, xs))),
)
VALUES = st.one_of(
    st.binary(max_size=24),
    NUMBERS.map(str.encode),
    st.integers(0, 65535).map(lambda n: struct.pack('<H', n)),
)
VRS = st.sampled_from(
    ['US', 'SS', 'SL', 'FD', 'FL', 'DS', 'IS', 'CS', 'LO', 'OB', 'OW', 'UN', 'SQ', 'AT']
)


@given(st.dictionaries(st.sampled_from(HEADER), st.tuples(VRS, VALUES), max_size=3))
@settings(max_examples=200, deadline=None)
def test_any_header_is_read_or_refused(wrong):
    ds = pydicom.dcmread(io.BytesIO(to_dicom(stored(8, False), WindowCenter=90, WindowWidth=80)))
    for name, (vr, value) in wrong.items():
        tag = pydicom.tag.Tag(name)
        value += b' ' * (len(value) % 2)
        ds._dict[tag] = RawDataElement(tag, vr, len(value), value, 0, False, True)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            ds.save_as(buffer := io.BytesIO())
        except Exception:  # pydicom does not write this
            return
        try:
            picture = decode(buffer.getvalue())
        except ImageError:
            return
        assert picture.dtype == np.uint8 and picture.shape == dimensions(buffer.getvalue())


def native_films():
    folder = Path(os.environ.get('CXR_DATA', 'data')) / 'native' / 'test'
    return sorted(folder.rglob('*.jpeg'))


def test_every_real_film_that_is_cut_or_holed_is_rejected():
    films = native_films()
    if not films:
        pytest.skip("there are no films at native size: set CXR_DATA")
    rng = np.random.default_rng(0)
    for film in films:
        whole = film.read_bytes()
        decode(whole, at_least=64)
        smallest = (
            64 if b'\xff\xc2' in whole[:1000] else 16
        )  # A progressive film has a scan of means
        for size in (smallest, 128, 700):
            at = int(len(whole) * rng.uniform(0.1, 0.9))
            for damaged in (
                whole[:at],
                whole[:at] + b'\xff\xd9',
                whole[:at] + bytes(size) + whole[at + size :],
                whole[:at] + whole[at + 700 :],
            ):
                with pytest.raises(CorruptImage):
                    decode(damaged, at_least=64)


def drawings():
    "Stripes, checks, waves, ramps, borders and noise"
    y, x = np.mgrid[:160, :200]
    for period in (1, 2, 3, 8, 16, 31):
        yield (x // period % 2) * 255
        yield (y // period % 2) * 255
        yield ((x // period + y // period) % 2) * 255
        yield 128 + 100 * np.sin(x * 2 * np.pi / (period + 0.5))
    yield x
    yield 255 - x
    yield np.where((x < 90) | (y < 60), 0, x)
    yield np.zeros((160, 200))
    yield np.full((160, 200), 255)
    yield np.random.default_rng(0).integers(0, 256, (160, 200))


@pytest.mark.parametrize('how', [dict(), dict(optimize=True), dict(progressive=True)], ids=str)
def test_no_sound_drawing_is_taken_for_a_damaged_one(how):
    for drawing in drawings():
        for quality in (10, 75, 95, 100):
            content = jpeg(drawing.astype(np.uint8), quality=quality, **how)
            assert (decode(content) == np.asarray(Image.open(io.BytesIO(content)))).all()


def test_a_hole_can_be_the_stream_of_another_image():
    "Which no reader can recognise: the damaged copy of one file is the sound file of another image"
    steps = np.arange(60, 156, 6).reshape(4, 4)
    a = np.kron(steps, np.ones((8, 8))).astype(np.uint8)
    b = a.copy()
    b[8:16, 8:16] += 1
    one, other = jpeg(a, quality=95), jpeg(b, quality=95)
    assert len(one) == len(other)
    differs = np.flatnonzero(np.frombuffer(one, 'u1') != np.frombuffer(other, 'u1'))
    first, last = differs[0], differs[-1]
    assert last - first < 4
    damaged = one[:first] + other[first : last + 1] + one[last + 1 :]
    assert (decode(damaged) == decode(other)).all()
    assert (decode(damaged) != decode(one)).any()


def jpeg_2000(pixels, **options):
    "A DICOM file with a JPEG 2000 codestream"
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, 'JPEG2000', no_jp2=True, **options)
    return encapsulated(pixels, uid.JPEG2000, buffer.getvalue())


JPEG_2000_OPTIONS = (
    dict(),
    dict(irreversible=True, quality_layers=[10]),
    dict(quality_layers=[40, 20, 0], progression='RPCL', tile_size=(100, 100)),
    dict(codeblock_size=(16, 16), num_resolutions=3, precinct_size=(64, 64)),
)


@pytest.mark.parametrize('options', JPEG_2000_OPTIONS, ids=str)
def test_sound_jpeg_2000_is_read(options):
    for pixels in [*drawings(), film_like()]:
        pixels = pixels.astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, 'JPEG2000', **options)  # In a JP2 file
        there = decode(encapsulated(pixels, uid.JPEG2000, buffer.getvalue()))
        assert (there == np.asarray(Image.open(buffer))).all()


@pytest.mark.parametrize('compression, least', [('lossless', 48), ('lossy', 38)])
@pytest.mark.parametrize('size', (4, 16, 64))
@pytest.mark.parametrize('filling', ('zeros', 'random bytes'))
def test_most_holes_in_jpeg_2000_are_rejected(compression, least, size, filling):
    lossy = dict(irreversible=True, quality_layers=[10])
    whole = jpeg_2000(film_like(), **(lossy if compression == 'lossy' else {}))
    rng = np.random.default_rng(size)
    first = whole.index(b'\xff\x93') + 2
    rejected = 0
    for at in rng.integers(first, len(whole) - 20 - size, 50):
        hole = bytes(size) if filling == 'zeros' else rng.bytes(size)
        try:
            decode(whole[:at] + hole + whole[at + size :])
        except CorruptImage:
            rejected += 1
    assert rejected >= least  # Of 50


def test_high_throughput_jpeg_2000_is_rejected():
    content = bytearray(jpeg_2000(film_like()))
    content[content.index(b'\xff\x52') + 12] |= 0x40
    with pytest.raises(UnsupportedDicom, match='high-throughput'):
        decode(bytes(content))


def test_public_dicom_files_show_dark_lungs():
    folder = Path(os.environ.get('CXR_DATA', 'data')) / 'dicom'
    files = sorted(folder.glob('*.dcm'))
    if not files:
        pytest.skip("there are no DICOM files: set CXR_DATA")
    for file in files:
        if file.stem.startswith('headless'):
            with pytest.raises(UnsupportedDicom, match='without preamble'):
                decode(file)
            continue
        x = resize(decode(file), 100)
        lungs = np.median([x[35:50, 20:35], x[35:50, 65:80]])
        assert lungs < np.median(x[55:70, 45:60])
        assert dimensions(file) == decode(file).shape


# --- Metadata ---


def chunk(name, content):
    checksum = zlib.crc32(name + content)
    return struct.pack('>I', len(content)) + name + content + struct.pack('>I', checksum)


def xmp(orientation):
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description '
        f'tiff:Orientation="{orientation}"/></x:xmpmeta>'
    ).encode()


def with_orientation(a, format, where, orientation):
    "A file whose EXIF or XMP says how it is turned; the PNG's EXIF may come after the pixels"
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(a)
    if format == 'JPEG':
        how = dict(exif=exif) if where == 'EXIF' else dict(xmp=xmp(orientation))
        return saved(image, 'JPEG', quality=98, **how)
    if where == 'EXIF':
        return saved(image, 'PNG', exif=exif)
    if where == 'XMP':
        info = PngImagePlugin.PngInfo()
        info.add_itxt('XML:com.adobe.xmp', xmp(orientation).decode())
        return saved(image, 'PNG', pnginfo=info)
    plain = png(a)
    return plain[:-12] + chunk(b'eXIf', exif.tobytes()[6:]) + plain[-12:]


UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).T,
    8: np.rot90,
}


@pytest.mark.parametrize(
    'format,where',
    [
        ('JPEG', 'EXIF'),
        ('JPEG', 'XMP'),
        ('PNG', 'EXIF'),
        ('PNG', 'XMP'),
        ('PNG', 'EXIF at the end'),
    ],
)
def test_orientation_by_exif_and_xmp_turns_pixels_and_size(format, where):
    y, x = np.mgrid[:H, :W]
    a = (x * 3 + y).astype(np.uint8)
    for orientation, turn in UPRIGHT.items():
        content = with_orientation(a, format, where, orientation)
        expected = turn(a).astype(int)
        assert np.abs(decode(content) - expected).max() <= 6
        assert dimensions(content) == expected.shape
        assert (read_image(content).grey == decode(content)).all()


def test_large_metadata_of_a_png_does_not_matter():
    a = stored(8, False)
    plain = png(a)
    noise = np.random.default_rng(0).bytes(3 * 2**20)
    for extra in (
        chunk(b'iCCP', b'profile\0\0' + zlib.compress(noise)),
        chunk(b'zTXt', b'comment\0\0' + zlib.compress(bytes(80 * 2**20))),
        chunk(b'tEXt', b'comment\0' + bytes(3 * 2**20)),
        chunk(b'tEXt', b'comment\0hello')[:-4] + b'oops',
    ):
        content = plain[:33] + extra + plain[33:]
        assert (decode(content) == a).all()
        assert dimensions(content) == a.shape


def test_metadata_that_may_turn_the_image_is_named_when_it_is_too_large():
    plain = png(stored(8, False))
    key = b'XML:com.adobe.xmp\0'
    for extra in (
        chunk(b'iTXt', key + b'\0\0\0\0' + bytes(2**20)),
        chunk(b'iTXt', key + b'\1\0\0\0' + zlib.compress(bytes(2**24))),
    ):
        with pytest.raises(TooLarge, match='without metadata'):
            decode(plain[:33] + extra + plain[33:])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.floats(0, 1), st.integers(1, 255))
def test_a_changed_byte_of_a_png_is_found(place, change):
    content = bytearray(png(stored(8, False)))
    at = 8 + int(place * (len(content) - 9))
    content[at] ^= change
    with pytest.raises(ImageError):
        decode(bytes(content))


def test_a_png_without_palette_or_end_is_damaged():
    image = Image.fromarray(stored(8, False)).convert('P')
    content = saved(image, 'PNG')
    at = content.index(b'PLTE')
    length = int.from_bytes(content[at - 4 : at])
    for damaged in (content[: at - 4] + content[at + 8 + length :], content[:-12]):
        with pytest.raises(CorruptImage, match='PNG file is truncated or damaged'):
            decode(damaged)


def test_without_openjpegs_functions_only_jpeg_2000_is_refused(monkeypatch):
    "A build of pylibjpeg-openjpeg may hide them"
    from cxr_study.data import decoders, dicom

    grey = np.tile(np.arange(64, dtype=np.uint8), (64, 1))
    dicom._openjpeg_library.cache_clear()
    monkeypatch.setattr(dicom, "_FUNCTIONS", ("opj_decode", "opj_hidden"))
    with pytest.raises(UnsupportedDicom, match="another transfer syntax"):
        decode(to_dicom(grey, "1.2.840.10008.1.2.4.90"))
    assert decode(to_dicom(grey)).shape == (64, 64)
    decoders._warm_up()
