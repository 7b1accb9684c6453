"""Every kind of picture file becomes the right square, and every bad one is one sentence."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from microvlm.errors import UserError
from microvlm.inputs.images import MAX_DECODED_PIXELS, fit_square, load_scaled, load_square

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def halves(mode: str = "RGB", size: tuple[int, int] = (40, 40)) -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image.convert(mode)


def write_huge_png(path: Path, side: int) -> None:
    """A valid 1-bit grey PNG of side x side pixels, written without holding it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(1)
    row = bytes(1 + -(-side // 8))
    body = b"".join(packer.compress(row * 100) for _ in range(side // 100)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def near(image: Image.Image, xy: tuple[int, int], colour: tuple[int, int, int], tolerance: int = 30) -> bool:
    return bool(np.abs(np.subtract(image.getpixel(xy), colour)).max() <= tolerance)


def test_a_picture_of_the_right_size_is_not_touched(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(load_square(tmp_path / "a.png", 96)), pixels)
    assert np.array_equal(np.asarray(load_square(pixels, 96)), pixels)


def test_a_wide_picture_is_kept_whole_and_centred_on_white():
    square = fit_square(halves(size=(200, 100)), 96)
    assert square.size == (96, 96)
    assert square.getpixel((48, 10)) == WHITE
    assert square.getpixel((48, 85)) == WHITE
    assert near(square, (5, 48), RED)
    assert near(square, (90, 48), BLUE)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_stretched_picture_fills_the_square(suffix, tmp_path):
    halves(size=(1000, 400)).save(tmp_path / f"a.{suffix}")
    square = load_square(tmp_path / f"a.{suffix}", 96, stretch=True)
    assert square.size == (96, 96)
    for y in (1, 94):
        assert near(square, (5, y), RED)
        assert near(square, (90, y), BLUE)
    square_already = halves(size=(96, 96))
    assert np.array_equal(
        np.asarray(load_square(square_already, 96, stretch=True)), np.asarray(square_already)
    )


@pytest.mark.parametrize(
    ("size", "scaled"), [((1000, 400), (96, 38)), ((20, 50), (38, 96)), ((9, 1), (96, 11))]
)
def test_a_scaled_picture_keeps_its_shape_whatever_it_is_read_from(size, scaled, tmp_path):
    picture = halves(size=size)
    picture.save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", (tmp_path / "a.png").read_bytes(), picture, np.asarray(picture)):
        image = load_scaled(source, 96)
        assert image.size == scaled
        assert near(image, (1, scaled[1] // 2), RED)
        assert near(image, (scaled[0] - 2, scaled[1] // 2), BLUE)


def test_a_one_pixel_picture_is_its_colour_everywhere(tmp_path):
    Image.new("RGB", (1, 1), GREEN).save(tmp_path / "dot.png")
    assert (np.asarray(load_square(tmp_path / "dot.png", 96)) == GREEN).all()


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1)])
def test_a_line_of_pixels_keeps_at_least_one(size, tmp_path):
    Image.new("RGB", size, BLUE).save(tmp_path / "line.png")
    assert (np.asarray(load_square(tmp_path / "line.png", 32)) != 255).any()


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "png"), ("1", "png"), ("L", "jpg"), ("CMYK", "jpg"), ("P", "gif")]
)
def test_grey_cmyk_and_palette_files_show_their_colours(mode, suffix, tmp_path):
    path = tmp_path / f"picture.{suffix}"
    source = (
        halves(mode) if mode in ("CMYK", "P") else halves("L").point(lambda v: 255 * (v > 50)).convert(mode)
    )
    source.save(path)
    square = load_square(path, 32)
    expected = (RED, BLUE) if mode in ("CMYK", "P") else (WHITE, (0, 0, 0))
    assert near(square, (4, 16), expected[0])
    assert near(square, (28, 16), expected[1])


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.full((32, 32), 32768, np.uint16)
    values[:, 16:] = 65535
    Image.fromarray(values).save(tmp_path / "deep.png")
    square = load_square(tmp_path / "deep.png", 32)
    assert abs(square.getpixel((4, 16))[0] - 128) <= 1
    assert square.getpixel((28, 16)) == WHITE


def test_floating_point_grey_is_read_as_zero_to_one(tmp_path):
    Image.fromarray(np.full((32, 32), 0.5, np.float32)).save(tmp_path / "float.tiff")
    assert load_square(tmp_path / "float.tiff", 32).getpixel((3, 3)) == (128, 128, 128)


def test_transparent_parts_are_white(tmp_path):
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (20, 0, 40, 40))
    image.save(tmp_path / "alpha.png")
    palette = image.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((0, 0)))
    for name in ("alpha.png", "palette.png"):
        square = load_square(tmp_path / name, 32)
        assert square.getpixel((4, 16)) == WHITE
        assert near(square, (28, 16), RED)


def test_an_animation_shows_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (32, 32), colour) for colour in (GREEN, RED, BLUE)]
    for name in ("moving.gif", "moving.webp", "moving.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=50, loop=0)
        assert near(load_square(tmp_path / name, 32), (16, 16), GREEN, 40), name


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright_once(orientation, suffix, tmp_path):
    upright = Image.new("RGB", (48, 48), WHITE)
    upright.paste(RED, (0, 0, 24, 24))
    upright.paste(BLUE, (24, 0, 48, 24))
    stored_pixels = {
        2: (Image.Transpose.FLIP_LEFT_RIGHT,),
        3: (Image.Transpose.ROTATE_180,),
        4: (Image.Transpose.FLIP_TOP_BOTTOM,),
        5: (Image.Transpose.TRANSPOSE,),
        6: (Image.Transpose.ROTATE_90,),
        7: (Image.Transpose.TRANSVERSE,),
        8: (Image.Transpose.ROTATE_270,),
    }.get(orientation, ())
    image = upright
    for turn in stored_pixels:
        image = image.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    image.save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    for source in (path, Image.open(path)):
        assert np.array_equal(np.asarray(load_square(source, 48)), np.asarray(upright))


def test_transparent_pixels_of_a_16_bit_grey_png_are_white(tmp_path):
    grey = np.full((32, 32), 40_000, np.uint16)
    grey[:16] = 77
    Image.fromarray(grey).save(tmp_path / "grey.png", transparency=77)
    square = load_square(tmp_path / "grey.png", 32)
    assert square.getpixel((4, 4)) == WHITE
    assert square.getpixel((4, 28)) == (156, 156, 156)


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(tmp_path):
    side = 5200
    assert side * side > MAX_DECODED_PIXELS
    halves("L", (side, side)).save(tmp_path / "large.jpg")
    square = load_square(tmp_path / "large.jpg", 96)
    assert abs(square.getpixel((10, 48))[0] - 76) <= 2
    assert abs(square.getpixel((90, 48))[0] - 29) <= 2


def photograph(width: int, height: int) -> Image.Image:
    """Smooth colours with grain, as a camera gives."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = 128 + 100 * np.sin(x * 95 / width) * np.cos(y * 95 / height)
    colours = np.stack([x / width * 255, y / height * 255, waves], -1)
    grain = np.random.default_rng(0).normal(0, 12, (height, width, 1))
    return Image.fromarray((colours + grain).clip(0, 255).astype(np.uint8))


_PEAK = """
import sys
from pathlib import Path
from microvlm.bench.provenance import memory_of_this_process
from microvlm.inputs.images import load_square
load_square(sys.argv[1], 224)
Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present size
before = memory_of_this_process()["peak_rss_bytes"]
load_square(sys.argv[2], 224)
print(memory_of_this_process()["peak_rss_bytes"] - before)
"""


@pytest.mark.parametrize(("progressive", "most_bytes"), [(False, 8_000_000), (True, 42_000_000)])
@pytest.mark.linux
def test_a_12_megapixel_photograph_is_never_held_at_full_size(progressive, most_bytes, tmp_path):
    """Pixels alone would be 48 MB. A progressive file needs its coefficients, 36 MB, and not the pixels besides."""
    photograph(64, 48).save(tmp_path / "small.jpg")
    photograph(4000, 3000).save(tmp_path / "large.jpg", quality=90, progressive=progressive)
    command = [sys.executable, "-P", "-c", _PEAK, tmp_path / "small.jpg", tmp_path / "large.jpg"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0 < int(process.stdout) < most_bytes


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(2000, 1500), (1999, 1501), (700, 1037)])
@pytest.mark.parametrize("side", [96, 224])
def test_a_photograph_decoded_at_draft_size_is_the_photograph(side, size, progressive, tmp_path):
    """The tolerance that `_reduce_while_decoding` states, against full decoding and against one resize of it."""
    path = tmp_path / "photograph.jpg"
    photograph(*size).save(path, quality=90, progressive=progressive)
    drafted = np.asarray(load_square(path, side), np.float32)
    full_image = Image.open(path).convert("RGB")
    scale = side / max(size)
    at_once = full_image.resize([round(length * scale) for length in size], Image.Resampling.BICUBIC)
    for reference in (fit_square(full_image, side), fit_square(at_once, side)):
        difference = np.abs(drafted - np.asarray(reference, np.float32))
        assert difference.max() <= 6
        assert difference.mean() <= 1


def test_a_progressive_picture_above_the_limit_names_its_size(tmp_path):
    Image.new("L", (6000, 6000)).save(tmp_path / "big.jpg", progressive=True)
    with pytest.raises(UserError, match="6000 x 6000 pixels"):
        load_square(tmp_path / "big.jpg", 96)


def test_a_picture_above_one_strip_equals_the_same_picture_in_one_piece(monkeypatch):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (700, 900, 3), dtype=np.uint8))
    expected = np.asarray(fit_square(image, 96))
    monkeypatch.setattr("microvlm.inputs.image_modes._STRIP_PIXELS", 5000)
    assert np.array_equal(np.asarray(fit_square(image, 96)), expected)


def test_a_20000_pixel_png_is_refused_before_it_is_decoded(tmp_path):
    write_huge_png(tmp_path / "huge.png", 20_000)
    with pytest.raises(UserError, match="too large a picture"):
        load_square(tmp_path / "huge.png", 96)


def test_a_picture_above_the_limit_names_its_size(tmp_path):
    write_huge_png(tmp_path / "big.png", 6000)
    with pytest.raises(UserError, match="6000 x 6000 pixels"):
        load_square(tmp_path / "big.png", 96)


def damaged_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """kind -> (file, part of the sentence)."""
    text = folder / "text.png"
    text.write_text("I am no picture.\n" * 50)
    empty = folder / "empty.png"
    empty.touch()
    complete_image = folder / "whole.jpg"
    Image.effect_noise((300, 200), 80).save(complete_image)
    truncated = folder / "truncated.jpg"
    truncated.write_bytes(complete_image.read_bytes()[:4000])
    noise = folder / "noise.png"
    Image.effect_noise((300, 200), 80).save(noise)
    cut_image = folder / "cut.png"
    cut_image.write_bytes(noise.read_bytes()[:3000])
    stub = folder / "stub.jpg"
    stub.write_bytes(complete_image.read_bytes()[:3])
    svg = folder / "drawing.svg"
    svg.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    return {
        "text": (text, "not a picture"),
        "empty": (empty, "empty"),
        "truncated": (truncated, "damaged"),
        "cut": (cut_image, "damaged"),
        "stub": (stub, "damaged|not a picture"),
        "svg": (svg, "not a picture"),
        "folder": (folder, "is a folder"),
        "missing": (folder / "none.png", "does not exist"),
    }


@pytest.mark.parametrize("kind", ["text", "empty", "truncated", "cut", "stub", "svg", "folder", "missing"])
def test_a_bad_file_is_one_sentence_that_names_it(kind, tmp_path):
    path, sentence = damaged_files(tmp_path)[kind]
    with pytest.raises(UserError, match=sentence) as error:
        load_square(path, 96)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
