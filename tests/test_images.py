"""From bytes to grey levels: against references computed from the stored arrays, damaged files and bombs."""

import io
import resource
import struct
import time
import warnings
import zlib

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import uid
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder

from cxr_study.core.options import defaults
from cxr_study.data.dicom import to_dicom
from cxr_study.data.formats import (
    CorruptImage,
    ImageError,
    Limits,
    TooLarge,
    UnsupportedDicom,
    UnsupportedFormat,
)
from cxr_study.data.images import Preprocess, decode, dimensions, read_image, resize

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


def lut(entries, first, bits, data):
    item = pydicom.Dataset()
    item.LUTDescriptor = [entries, first, bits]
    item.add_new('LUTData', 'OW', np.asarray(data, '<u2').tobytes())
    return [item]


# --- The reference: the standard's formulas, value by value, in double precision ---


def reference(a, bits, signed, recipe, inverted):
    value = {int(v): float(v) for v in np.unique(a)}
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
            k: data[min(max(int(round(v)) - first, 0), entries - 1)] / (2**depth - 1)
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
    grey = {k: 255 * (1 - v if inverted else v) for k, v in shown.items()}
    return np.vectorize(lambda k: grey[int(k)])(a)


def recipes(bits, signed):
    low = -(2 ** (bits - 1)) if signed else 0
    n, mid = 2**bits, low + 2 ** (bits - 1)
    curve = np.round(1023 * np.sqrt(np.arange(n) / n)).astype(int)
    return {
        'plain': {},
        'window': dict(window=(mid, n // 3)),
        'rescale and window': dict(rescale=(2, -50), window=(2 * mid - 50, n)),
        'VOI LUT': dict(voi=(n % 65536 or 65536, low, 10, curve))
        if n < 65536
        else dict(voi=(60000, low + 100, 10, curve[:60000])),
        'modality LUT': dict(
            modality=(
                min(n, 60000),
                low,
                16,
                np.round(65535 * (np.arange(min(n, 60000)) / n) ** 2).astype(int),
            )
        ),
    }


def elements(recipe):
    found = {}
    if 'rescale' in recipe:
        found.update(
            RescaleSlope=recipe['rescale'][0],
            RescaleIntercept=recipe['rescale'][1],
            RescaleType='US',
        )
    if 'window' in recipe:
        found.update(WindowCenter=recipe['window'][0], WindowWidth=recipe['window'][1])
    if 'voi' in recipe:
        found['VOILUTSequence'] = lut(*recipe['voi'])
    if 'modality' in recipe:
        found['ModalityLUTSequence'] = lut(*recipe['modality'])
    return found


MATRIX = [
    (p, bits, signed, name)
    for p in ('MONOCHROME1', 'MONOCHROME2')
    for bits in (8, 12, 16)
    for signed in (False, True)
    for name in recipes(8, False)
]


@pytest.mark.parametrize('photometric,bits,signed,name', MATRIX)
def test_dicom_matrix(photometric, bits, signed, name):
    a, recipe = stored(bits, signed), recipes(bits, signed)[name]
    got = decode(
        to_dicom(a, PhotometricInterpretation=photometric, BitsStored=bits, **elements(recipe))
    )
    assert np.abs(got - reference(a, bits, signed, recipe, photometric == 'MONOCHROME1')).max() <= 1


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


LOSSLESS = [
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.RLELossless,
    uid.JPEG2000Lossless,
    uid.JPEGLSLossless,
    uid.JPEGLosslessSV1,
]


@pytest.mark.parametrize('syntax', LOSSLESS, ids=lambda s: s.name)
@pytest.mark.parametrize(
    'bits,signed', [(8, False), (12, False), (12, True), (16, False), (16, True)]
)
def test_transfer_syntaxes(syntax, bits, signed):
    if syntax == uid.JPEGLSLossless:
        pytest.importorskip(
            'jpeg_ls', reason="pyjpegls, which encodes the JPEG-LS file, is not installed"
        )
        decoder = get_decoder(syntax)
        if 'pyjpegls' in decoder.available_plugins:
            decoder.remove_plugin('pyjpegls')
    a = stored(bits, signed)
    recipe = recipes(bits, signed)['window']
    got = decode(
        in_syntax(a, syntax, bits, PhotometricInterpretation='MONOCHROME1', **elements(recipe))
    )
    assert np.abs(got - reference(a, bits, signed, recipe, True)).max() <= 1


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


def test_presentation_inverse_inverts_once():
    a = stored(12, False)
    plain = decode(to_dicom(a, BitsStored=12))
    inverse = decode(to_dicom(a, BitsStored=12, PresentationLUTShape='INVERSE'))
    both = decode(
        to_dicom(
            a,
            BitsStored=12,
            PresentationLUTShape='INVERSE',
            PhotometricInterpretation='MONOCHROME1',
        )
    )
    assert (inverse == both).all()
    assert np.abs(255 - plain.astype(int) - inverse).max() <= 1


REJECTED = {
    'modality is CT': dict(Modality='CT'),
    'modality is missing': dict(Modality=None),
    'lateral': dict(ViewPosition='LL'),
    'several frames': dict(NumberOfFrames=2),
    'no pixel data': dict(PixelData=None),
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


def test_dicom_without_preamble_or_transfer_syntax():
    whole = to_dicom(stored(8, False))
    with pytest.raises(UnsupportedDicom, match='without preamble'):
        decode(whole[whole.index(b'\x08\x00\x16\x00') :])
    at = whole.index(b'\x02\x00\x10\x00UI')
    with pytest.raises(ImageError):
        decode(whole[:at] + whole[at + 8 + whole[at + 6] :])


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


def test_exif_orientation_is_applied():
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


def test_deflated_dicom_is_rejected():
    with pytest.raises(UnsupportedDicom, match='deflated'):
        decode(to_dicom(np.zeros((2000, 2000), np.uint8), uid.DeflatedExplicitVRLittleEndian))


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


def test_ten_thousand_damaged_files_give_only_typed_errors():
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
        for i, content in enumerate(mutations(seeds, 10_000, np.random.default_rng(0))):
            try:
                decode(content)
                counts['decoded'] += 1
            except ImageError:
                counts['rejected'] += 1
            if i in (3000, 9999):
                peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert counts['decoded'] > 1000 and counts['rejected'] > 1000
    assert peak[1] - peak[0] < 50_000, "kilobytes of growth over 7,000 inputs"


def test_dimensions_agree_with_decoding():
    for content in (
        jpeg(stored(8, False)),
        png(stored(16, False)),
        to_dicom(stored(12, False), BitsStored=12),
    ):
        assert dimensions(content) == decode(content).shape == (H, W)
