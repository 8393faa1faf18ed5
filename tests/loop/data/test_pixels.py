"""What the model sees of a picture: transparency, orientation, depth, size, and faint ones."""

import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import quirks
from PIL import Image

from kepo.__main__ import main
from kepo.config import Config
from kepo.data import images
from kepo.data.images import Look, digests_of, looks_of, open_rgb
from kepo.data.pixels import MAX_PIXELS, Turns
from kepo.data.run_data import load_data
from kepo.errors import KepoDataError

WHITE = (255, 255, 255)


def write_png(path: Path, size: tuple, bits: int, kind: int, rows: bytes, *more: tuple) -> Path:
    """A PNG from its parts, for what Pillow does not write; every row begins with a zero byte."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    header = struct.pack(">IIBBBBB", *size, bits, kind, 0, 0, 0)
    parts = [(b"IHDR", header), *more, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    return path


def first_row(path: Path) -> list[int]:
    return np.asarray(open_rgb(path))[0, :, 0].tolist()


# ---- transparency


def drawing() -> Image.Image:
    """A dark square on nothing, under which the colour is black."""
    drawn = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    drawn.paste((10, 10, 10, 255), (5, 5, 15, 15))
    return drawn


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("RGBA", "x.png"),
        ("LA", "x.png"),
        ("RGBA", "x.webp"),
        ("RGBA", "x.tif"),
        ("P", "x.png"),
        ("P", "x.gif"),
    ],
)
def test_what_is_transparent_is_white(tmp_path, mode, name):
    image, settings = drawing(), {"lossless": True} if name == "x.webp" else {}
    if mode == "P":
        image = image.convert("P", palette=Image.Palette.ADAPTIVE)
        settings = {"transparency": image.getpixel((0, 0))}
    image = image.convert(mode)
    image.save(tmp_path / name, **settings)
    seen = open_rgb(tmp_path / name)
    assert seen.mode == "RGB" and seen.getpixel((0, 0)) == WHITE
    assert max(seen.getpixel((10, 10))) < 20


def test_half_transparent_is_mixed_as_qwens_utilities_do(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "x.png")
    white = Image.new("RGB", image.size, WHITE)
    white.paste(image, mask=image.split()[3])
    assert open_rgb(tmp_path / "x.png").tobytes() == white.tobytes()


@pytest.mark.parametrize(
    ("bits", "kind", "row", "key", "seen"),
    [
        (8, 0, bytes([0, 9, 200]), (9,), [0, 255, 200]),
        (2, 0, bytes([0b000110_00]), (1,), [0, 255, 170]),
        (1, 0, bytes([0b010_00000]), (0,), [255, 255, 255]),
        (16, 0, struct.pack(">3H", 0, 1000, 4095), (0,), [255, 62, 255]),
        (8, 2, bytes([1, 1, 1, 2, 2, 2, 3, 3, 3]), (2, 2, 2), [1, 255, 3]),
        (16, 2, struct.pack(">9H", *[0] * 3, *[256] * 3, *[9999] * 3), (256,) * 3, [0, 255, 39]),
        (
            *(16, 2, struct.pack(">9H", 0x1234, 0, 0, 0x1235, 0, 0, 0x1235, 0, 1)),
            *((0x1235, 0, 0), [0x12, 255, 0x12]),
        ),
    ],
)
def test_a_value_that_stands_for_nothing_is_white(tmp_path, bits, kind, row, key, seen):
    named = (b"tRNS", struct.pack(f">{len(key)}H", *key))
    path = write_png(tmp_path / "x.png", (3, 1), bits, kind, b"\0" + row, named)
    assert first_row(path) == seen


def test_a_deep_key_is_found_in_every_band_and_turned_with_the_picture(tmp_path):
    """Every 16 bits count, in a picture of several bands, against the rule written out."""
    rng = np.random.default_rng(0)
    deep = rng.integers(0x1230, 0x1238, (1100, 1000, 3)).astype(">u2")
    key = (0x1233, 0x1234, 0x1235)
    exif = Image.Exif()
    exif[0x0112] = 3
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    more = (b"tRNS", struct.pack(">3H", *key)), (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    path = write_png(tmp_path / "x.png", (1000, 1100), 16, 2, rows, *more)
    wanted = np.where((deep == key).all(-1)[..., None], 255, deep >> 8).astype(np.uint8)[::-1, ::-1]
    assert (wanted == 255).any(), "the key is nowhere"
    assert (np.asarray(open_rgb(path)) == wanted).all()


# ---- orientation


@pytest.mark.parametrize("name", ["x.png", "x.webp", "x.tif", "x.jpg"])
@pytest.mark.parametrize(
    ("value", "corner"), [(1, (0, 0)), (3, (31, 15)), (6, (15, 0)), (8, (0, 31))]
)
def test_a_picture_is_turned_as_it_says(tmp_path, name, value, corner):
    image = Image.new("RGB", (32, 16))
    image.paste(WHITE, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = value
    more = {"tiffinfo": {0x0112: value}} if name == "x.tif" else {"exif": exif.tobytes()}
    image.save(tmp_path / name, **more)
    seen = open_rgb(tmp_path / name)
    assert seen.size == ((16, 32) if value in (6, 8) else (32, 16))
    assert min(seen.getpixel(corner)) > 200
    upright = tmp_path / "upright.png"
    seen.save(upright)
    assert len(set(digests_of([tmp_path / name, upright]).values())) == 1


def test_broken_exif_turns_nothing(tmp_path):
    Image.new("RGB", (4, 2)).save(tmp_path / "x.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    with pytest.MonkeyPatch.context() as patch:

        def broken(self):
            raise SyntaxError("not a TIFF file")

        patch.setattr(Image.Image, "getexif", broken)
        assert open_rgb(tmp_path / "x.jpg").size == (4, 2)


# ---- depth


@pytest.mark.parametrize("bits", range(8, 17))
@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_grey_of_n_bits_fills_the_range(tmp_path, bits, name):
    values = np.linspace(0, 2**bits - 1, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / name)
    seen = np.asarray(open_rgb(tmp_path / name))[..., 0]
    assert (seen == values >> (bits - 8)).all() and seen.max() == 255
    assert len(np.unique(seen)) > 250


def test_sixteen_bits_made_of_eight_have_the_same_digest(tmp_path):
    grey = np.random.default_rng(0).integers(40, 200, (8, 8)).astype(np.uint16)
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(grey * 257).save(tmp_path / "b.png")
    assert len(set(digests_of([tmp_path / "a.png", tmp_path / "b.png"]).values())) == 1


@pytest.mark.parametrize("kind", ["I", "F", "I;16B", "deflate", "white is 0"])
def test_twelve_bits_look_the_same_however_they_are_stored(tmp_path, kind):
    values = np.array([[0, 1000, 2000, 4095]], np.uint16)
    image, settings = Image.fromarray(values), {}
    if kind in ("I", "F"):
        image = Image.fromarray(values.astype({"I": np.int32, "F": np.float32}[kind]))
    elif kind == "I;16B":
        image = image.convert("I").convert("I;16B")
    elif kind == "deflate":
        settings = {"compression": "tiff_deflate"}
    else:
        settings = {"tiffinfo": {262: 0}}
    image.save(tmp_path / "x.tif", **settings)
    expected = [0, 62, 125, 255]
    if kind == "white is 0":
        expected = [255 - value for value in expected]
    assert first_row(tmp_path / "x.tif") == expected


@pytest.mark.parametrize(
    "values", [[-1.0, 5.0], [0.0, 1.5], [0.0, float("nan")], [0.0, float("inf")], [0, 70000]]
)
def test_numbers_without_an_agreed_white_are_refused(tmp_path, values):
    array = np.array([values], np.int32 if isinstance(values[1], int) else np.float32)
    Image.fromarray(array).save(tmp_path / "x.tif")
    with pytest.raises(KepoDataError, match=r"x.tif: mode [IF] .*no agreed white; save it with 8"):
        open_rgb(tmp_path / "x.tif")


@pytest.mark.parametrize(("mode", "color"), [("CMYK", (0, 255, 255, 0)), ("1", 1), ("P", 1)])
def test_other_modes_are_made_rgb(tmp_path, mode, color):
    image = Image.new(mode, (4, 4), color)
    if mode == "P":
        image.putpalette([0, 0, 0, 255, 0, 0])
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    image.save(path)
    red, green, blue = open_rgb(path).getpixel((0, 0))
    assert red > 250 and (green, blue) == ((255, 255) if mode == "1" else (0, 0))


# ---- size


def bomb(path: Path, width: int, height: int) -> Path:
    """A PNG whose file is small and whose picture is not: one grey, of one bit."""
    row = b"\0" * (1 + (width + 7) // 8)
    return write_png(path, (width, height), 1, 0, row * height)


def test_a_picture_too_large_is_refused_by_its_header(tmp_path, monkeypatch):
    def decode(self):
        raise AssertionError("a pixel was decoded")

    from PIL import PngImagePlugin

    bomb(tmp_path / "x.png", 8192, 8193)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", decode)
    (seen,) = looks_of([tmp_path / "x.png"]).values()
    assert isinstance(seen, KepoDataError)
    assert "x.png: 8192 x 8193 pixels are too many" in str(seen) and str(MAX_PIXELS) in str(seen)


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.bmp", "x.tif", "x.gif"])
def test_the_bound_holds_for_every_format_and_its_frames(tmp_path, monkeypatch, name):
    frames = [Image.new("L", (8, 8), value) for value in (0, 99)]
    more = {"save_all": True, "append_images": frames[1:]} if name[2:] in ("gif", "tif") else {}
    frames[0].save(tmp_path / name, **more)
    assert open_rgb(tmp_path / name).size == (8, 8)
    monkeypatch.setattr(images, "MAX_PIXELS", 63)
    with pytest.raises(KepoDataError, match="8 x 8 pixels are too many"):
        open_rgb(tmp_path / name)


def test_a_tile_larger_than_the_picture_counts(tmp_path):
    """Pillow leaves the tags of tiles out when it writes: they are written under other numbers."""
    path, tags = tmp_path / "x.tif", {65000: 2**15, 65001: 2**15}
    Image.new("L", (8, 8)).save(path, tiffinfo=tags)
    content = path.read_bytes()
    for tag, real in zip(tags, (322, 323), strict=True):
        assert content.count(struct.pack("<H", tag)) == 1
        content = content.replace(struct.pack("<H", tag), struct.pack("<H", real))
    path.write_bytes(content)
    with pytest.raises(KepoDataError, match="too many"):
        open_rgb(tmp_path / "x.tif")


def test_threads_take_turns_in_order():
    turns, inside, most, order = Turns(10), [], [], []
    entered = threading.Event()

    def work(amount, name):
        with turns.of(amount):
            inside.append(amount)
            most.append(sum(inside))
            order.append(name)
            entered.set()
            threading.Event().wait(0.005)
            inside.remove(amount)

    threads = [threading.Thread(target=work, args=(a, n)) for n, a in enumerate([6, 10, 4, 3, 25])]
    for thread in threads:
        thread.start()
        entered.wait()
    for thread in threads:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in threads)
    assert sorted(order) == [0, 1, 2, 3, 4]
    assert all(total <= 10 or total == 25 for total in most)


def test_a_turn_ends_with_an_error():
    turns = Turns(1)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), turns.of(1):
            1 / 0  # noqa: B018
    with turns.of(1):
        pass


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_threads_together_hold_what_one_picture_may(tmp_path):
    """Eight of 16 million pixels in eight threads, no more of them at a time than MAX_PIXELS.

    The child counts from where it stands after a small picture; a pixel of these takes 5 bytes.
    """
    limit = 2**24
    row = b"\0" * (1 + 3 * 4096)
    write_png(tmp_path / "0.png", (4096, 4096), 8, 2, row * 4096)
    for number in range(1, 8):
        (tmp_path / f"{number}.png").hardlink_to(tmp_path / "0.png")
    bomb(tmp_path / "small.png", 8, 8)
    script = f"""
import os, sys
from pathlib import Path
from kepo.data import images
from kepo.data import pixels
images._turns = pixels.Turns({limit})
os.cpu_count = lambda: 8
def peak():  # of this program alone; what getrusage says was carried over from its parent
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
root = Path(sys.argv[1])
images.looks_of([root / "small.png"])
before = peak()
looks = images.looks_of([root / f"{{number}}.png" for number in range(8)])
assert len(looks) == 8 and not any(isinstance(look, Exception) for look in looks.values())
print(peak() - before)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 9 * limit


# ---- faint pictures


def test_faint_pictures_are_told_from_others(tmp_path):
    rng = np.random.default_rng(0)
    pictures = {
        "nearly black": rng.integers(0, 20, (64, 64)),
        "flat": rng.integers(120, 130, (64, 64)),
        "": rng.integers(0, 256, (64, 64)),
    }
    hot = pictures["nearly black"].copy()
    hot[0, 0] = 255  # one pixel that the detector gets wrong
    for name, pixels in (*pictures.items(), ("hot", hot)):
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"a{name}.png")
        (seen,) = looks_of([tmp_path / f"a{name}.png"]).values()
        assert isinstance(seen, Look) and seen.faint == ("nearly black" if name == "hot" else name)


def test_check_names_faint_pictures_and_does_not_call_them_wrong(tmp_path, capsys):
    made = quirks.write_quirks(tmp_path / "made")
    clean = quirks.write_good(made, tmp_path / "clean")
    Image.new("L", (8, 8), 3).save(clean / "Images" / "1.png")
    assert main(["data", "check", str(clean)]) == 0
    out = capsys.readouterr().out
    assert "nothing is wrong" in out
    assert "     2  picture nearly black\n" in out  # two questions about it
    assert "pictures that come out nearly black: 1\n" in out
    assert f"{clean.resolve() / 'Images' / '1.png'}\n" in out
    data = load_data(Config(student="s", train_data=str(clean), run_dir=str(tmp_path)))
    assert data.record["train"]["quirks"]["picture nearly black"] == 2
