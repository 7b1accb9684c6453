"""Every mode, format, orientation, transparency and depth of a picture becomes the pixels that its source states."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from picture_encoders import ico, png_chunk
from picture_files import SIDE, PictureRow, on_white, samples, table, to_bytes
from PIL import Image

from microvlm.errors import UserError
from microvlm.inputs.images import load_square

ROWS = table()


def assert_matches(row: PictureRow, source: object) -> None:
    """`source` loads as the row expects, or is refused by the row's words in one line."""
    if isinstance(row.expected, str):
        with pytest.raises(UserError, match=row.expected) as error:
            load_square(source, SIDE)
        assert "\n" not in str(error.value)
        return
    difference = np.abs(np.asarray(load_square(source, SIDE), np.int16) - row.expected)
    assert difference.max() <= row.tolerance


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_picture_file_becomes_the_pixels_of_its_source(row, tmp_path):
    path = tmp_path / row.name
    path.write_bytes(row.content)
    assert_matches(row, row.content)
    assert_matches(row, path)
    if not isinstance(row.expected, str):
        with Image.open(path) as image:
            assert_matches(row, image)


def test_the_table_has_every_format_and_every_orientation():
    suffixes = {row.name.rpartition(".")[2] for row in ROWS}
    assert {"png", "jpg", "gif", "webp", "bmp", "tif", "ppm", "pgm", "pbm", "ico"} <= suffixes
    for suffix in ("png", "jpg", "webp", "tif"):
        for orientation in range(1, 9):
            assert any(f"-o{orientation}" in row.name and row.name.endswith(suffix) for row in ROWS)
    assert len({row.name for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_pixels_do_not_depend_on_the_size_of_the_strips(row, monkeypatch):
    if not isinstance(row.expected, str):
        whole = np.asarray(load_square(row.content, SIDE))
        monkeypatch.setattr("microvlm.inputs.image_modes._STRIP_PIXELS", 3 * SIDE)
        assert np.array_equal(np.asarray(load_square(row.content, SIDE)), whole)


def pillow_images() -> dict[str, tuple[Image.Image, np.ndarray]]:
    """Mode -> an image that no file has here, and its pixels."""
    rgba = samples(8, 4)
    colour, alpha = rgba[..., :3], rgba[..., 3]
    premultiplied = (
        rgba.astype(int) * np.concatenate([alpha[..., None]] * 3 + [alpha[..., None] * 0 + 255], -1)
    ) // 255
    palette = np.random.default_rng(1).integers(0, 256, (256, 4), np.uint8)
    index = samples(8)[..., 0].astype(np.uint8)

    def of_bytes(mode: str, values: np.ndarray) -> Image.Image:
        return Image.frombytes(mode, (SIDE, 20), np.ascontiguousarray(values.astype(np.uint8)).tobytes())

    with_alpha_palette = of_bytes("P", index)
    with_alpha_palette.putpalette(palette.tobytes(), "RGBA")
    named = of_bytes("P", index)
    named.putpalette(palette[:, :3].tobytes())
    named.info["transparency"] = 9
    with_alpha = of_bytes("PA", np.stack([index, alpha], -1))
    with_alpha.putpalette(palette[:, :3].tobytes())
    deep = samples(16)
    return {
        "RGBX": (of_bytes("RGBX", rgba), on_white(colour)),
        "RGBa": (of_bytes("RGBa", premultiplied), on_white(colour, alpha)),
        "La": (of_bytes("La", premultiplied[..., [0, 3]]), on_white(colour[..., :1], alpha)),
        "P, palette with alpha": (with_alpha_palette, on_white(palette[index, :3], palette[index, 3])),
        "P, one entry": (named, on_white(palette[index, :3], 255 * (index != 9))),
        "PA": (with_alpha, on_white(palette[index, :3], alpha)),
        "I": (Image.fromarray(deep[..., 0].astype(np.int32)), on_white(to_bytes(deep, 16))),
        "I;16": (Image.fromarray(deep[..., 0].astype(np.uint16)), on_white(to_bytes(deep, 16))),
        "I;16B": (
            Image.frombytes("I;16B", (SIDE, 20), deep.astype(">u2").tobytes()),
            on_white(to_bytes(deep, 16)),
        ),
        "F": (Image.fromarray((samples(8)[..., 0] / 255).astype(np.float32)), on_white(samples(8))),
    }


@pytest.mark.parametrize("mode", pillow_images())
def test_a_pillow_image_of_any_mode_has_its_own_pixels(mode):
    image, expected = pillow_images()[mode]
    difference = np.abs(np.asarray(load_square(image, SIDE), np.int16) - expected)
    # A premultiplied colour has lost what the alpha hides.
    assert difference.max() <= (3 if mode.endswith("a") else 1)


def test_reading_an_image_leaves_it_as_it_was():
    row = next(row for row in ROWS if row.name == "grey4-trns.png")
    image = Image.open(io.BytesIO(row.content))
    before = dict(image.info)
    assert_matches(row, image)
    assert image.info == before


def test_a_refusal_names_the_file(tmp_path):
    row = next(row for row in ROWS if row.name == "lab.tif")
    (tmp_path / "a\x1b[31m.tif").write_bytes(row.content)
    with pytest.raises(UserError, match=r"a\\x1b\[31m.tif has CIELAB colours"):
        load_square(tmp_path / "a\x1b[31m.tif", SIDE)


@pytest.mark.linux
def test_an_icon_that_holds_a_huge_picture_is_refused_before_it_is_decoded():
    """Its table says 32 x 20, which is all that Pillow looks at before it decodes 676 MB."""
    import resource

    side = 13_000
    packer = zlib.compressobj(1)
    row = bytes(1 + 4 * side)
    body = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)
    image = (
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="too large a picture"):
        load_square(ico(image, SIDE, 20, 32), SIDE)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_a_damaged_icon_is_refused():
    for content in (b"\0\0\1\0", b"\0\0\1\0\1", b"\0\0\1\0\xff\xff" + bytes(40), ico(b"", 32, 20, 32)):
        with pytest.raises(UserError, match=r"damaged|not a picture"):
            load_square(content, SIDE)
