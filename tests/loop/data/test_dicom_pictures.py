"""Real pictures of more than 8 bits, those of pydicom-data, beside what their own windows show."""

from pathlib import Path

import numpy as np
import pytest
import quirks
from PIL import Image

pytest.importorskip("pydicom")
pytest.importorskip("data_store", reason="the package pydicom-data")

import pydicom.data
from pydicom import pixels

from kepo.__main__ import main
from kepo.data.images import looks_of, open_rgb
from kepo.errors import KepoDataError

WHITE_IS_ZERO = {262: 0}
"""A TIFF's tag of how grey is meant, and its value for what DICOM calls MONOCHROME1."""


def scan(name: str) -> tuple[pydicom.Dataset, np.ndarray]:
    file = pydicom.data.get_testdata_file(name, download=False)
    assert file is not None, f"pydicom-data has no {name}"
    scanned = pydicom.dcmread(file)
    return scanned, scanned.pixel_array


def first(value) -> float:
    """Of a file that offers several windows."""
    return float(value if not hasattr(value, "__len__") else value[0])


def windowed(scanned: pydicom.Dataset, values: np.ndarray) -> np.ndarray:
    """Grey from 0 to 255 by the window in the file, written out (DICOM PS3.3, C.11.2.1.2)."""
    centre, width = first(scanned.WindowCenter), first(scanned.WindowWidth)
    grey = (pixels.apply_modality_lut(values, scanned) - (centre - 0.5)) / (width - 1) + 0.5
    return 255 * grey.clip(0, 1)


def grey_of(path: Path) -> np.ndarray:
    return np.asarray(open_rgb(path))[..., 0].astype(float)


def kept(shown: np.ndarray, wanted: np.ndarray) -> float:
    """How much of the window's contrast is left: 1 is all, and the order of greys must be its."""
    assert np.corrcoef(shown.ravel(), wanted.ravel())[0, 1] > 0.99
    return shown.std() / wanted.std()


@pytest.mark.parametrize(
    ("name", "by_bits"),
    [
        ("MR-SIEMENS-DICOM-WithOverlays.dcm", 0.44),  # 12 bits, of which 1123 is the brightest
        ("MR2_UNCR.dcm", 0.52),  # 12 bits, up to 595
        ("RG1_UNCR.dcm", 0.92),  # 15 bits
        ("RG3_UNCR.dcm", 1.04),  # 10 bits, all of them used
        ("MR_small.dcm", 0.42),  # signed, up to 2145, and its window begins below 0
    ],
)
def test_deep_grey_has_the_contrast_of_the_files_own_window(tmp_path, name, by_bits):
    scanned, values = scan(name)
    # A quarter of the pixels of a large one, for the time it takes.
    values = values[:: 1 + (values.size > 2**21), :: 1 + (values.size > 2**21)]
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "x.png")
    wanted = windowed(scanned, values)
    assert 0.8 < kept(grey_of(tmp_path / "x.png"), wanted) < 1.25
    # White at the next power of two, the rule before this one, leaves half of it in three of them.
    shift = int(values.max()).bit_length() - 8
    assert kept((values >> shift).astype(float), wanted) == pytest.approx(by_bits, abs=0.02)


def test_monochrome1_is_shown_with_zero_as_white(tmp_path):
    scanned, values = scan("RG3_UNCR.dcm")
    assert scanned.PhotometricInterpretation == "MONOCHROME1"
    values = values[::2, ::2]
    Image.fromarray(values).save(tmp_path / "x.tif", tiffinfo=WHITE_IS_ZERO)
    Image.fromarray(values).save(tmp_path / "plain.tif")
    shown = grey_of(tmp_path / "x.tif")
    assert (shown == 255 - grey_of(tmp_path / "plain.tif")).all()
    assert 0.8 < kept(shown, 255 - windowed(scanned, values)) < 1.25


def test_a_palette_is_looked_up(tmp_path):
    scanned, values = scan("OBXXXX1A.dcm")
    assert scanned.PhotometricInterpretation == "PALETTE COLOR"
    wanted = (pixels.apply_color_lut(values, scanned) >> 8).astype(np.uint8)
    palette = pixels.apply_color_lut(np.arange(256, dtype=np.uint8)[None], scanned) >> 8
    image = Image.fromarray(values).convert("P")
    image.putpalette(palette.astype(np.uint8).tobytes())
    image.save(tmp_path / "x.png")
    assert (np.asarray(open_rgb(tmp_path / "x.png")) == wanted).all()


def test_numbers_below_zero_are_refused_by_name(tmp_path):
    """A CT in Hounsfield units has no white until somebody chooses a window."""
    scanned, values = scan("CT_small.dcm")
    units = pixels.apply_modality_lut(values, scanned)
    assert units.min() < 0
    Image.fromarray(units.astype(np.int32)).save(tmp_path / "x.tif")
    with pytest.raises(KepoDataError, match=r"x\.tif: .*no agreed white; save it with 8 bits"):
        open_rgb(tmp_path / "x.tif")


def test_check_names_a_scan_whose_upper_bits_alone_were_kept(tmp_path, capsys):
    _, values = scan("MR2_UNCR.dcm")
    made = quirks.write_quirks(tmp_path / "made")
    clean = quirks.write_good(made, tmp_path / "clean")
    picture = clean / "Images" / "1.png"
    Image.fromarray(values[::4, ::4]).save(picture)
    (look,) = looks_of([picture]).values()
    assert not look.faint
    Image.fromarray((values[::4, ::4] >> 8).astype(np.uint8)).save(picture)
    assert main(["data", "check", str(clean)]) == 0
    out = capsys.readouterr().out
    assert "pictures that come out" in out and str(picture) in out
