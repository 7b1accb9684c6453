"""Small encoders of picture files: PNG, TIFF, BMP, GIF and icons, written byte by byte from an array of samples."""

from __future__ import annotations

import struct
import zlib

import numpy as np

TIFF_LITTLE, TIFF_BIG = "<", ">"


def pack_rows(values: np.ndarray, bits: int, order: str = TIFF_BIG) -> list[bytes]:
    """Samples [H, W, C] as the bytes of each row; others are packed from the highest bit on."""
    flat = values.reshape(len(values), -1)
    if bits in (8, 16, 32):
        return [row.astype(f"{order}u{bits // 8}").tobytes() for row in flat]
    single = (flat[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return [np.packbits(row.astype(np.uint8).reshape(-1)).tobytes() for row in single]


def exif(orientation: int) -> bytes:
    """An EXIF block that has the orientation only."""
    return b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x112, 3, 1, orientation, 0, 0)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    values: np.ndarray,
    bits: int,
    colour_type: int,
    *,
    palette: bytes = b"",
    transparency: bytes = b"",
    interlaced: bool = False,
    before: bytes = b"",
    after: bytes = b"",
) -> bytes:
    """A PNG of samples [H, W, C]. `before` and `after`: chunks before and after the image data."""
    height, width = values.shape[:2]
    passes = [(0, 0, 1, 1)]
    if interlaced:  # Adam7: x, y, step in x, step in y
        passes = [
            (0, 0, 8, 8),
            (4, 0, 8, 8),
            (0, 4, 4, 8),
            (2, 0, 4, 4),
            (0, 2, 2, 4),
            (1, 0, 2, 2),
            (0, 1, 1, 2),
        ]
    parts = [values[y::dy, x::dx] for x, y, dx, dy in passes]
    lines = b"".join(b"\0" + row for part in parts if part.size for row in pack_rows(part, bits))
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, interlaced)),
            png_chunk(b"PLTE", palette) if palette else b"",
            png_chunk(b"tRNS", transparency) if transparency else b"",
            before,
            png_chunk(b"IDAT", zlib.compress(lines)),
            after,
            png_chunk(b"IEND", b""),
        )
    )


def tiff(
    values: np.ndarray,
    bits: int,
    photometric: int,
    *,
    order: str = TIFF_LITTLE,
    extra: int | None = None,
    sample_format: int = 1,
    planar: bool = False,
    compressed: bool = False,
    predictor: bool = False,
    orientation: int = 1,
    colour_map: np.ndarray | None = None,
    pages: int = 1,
) -> bytes:
    """A TIFF of samples [H, W, C]: one strip, or one per channel if `planar`. Further `pages` are black.

    `extra`: meaning of the last channel (0 none, 1 premultiplied alpha, 2 alpha). `colour_map`: 16 bits, [3, colours].
    """
    height, width, channels = values.shape
    data = values
    if predictor:
        data = np.diff(values, axis=1, prepend=0) % (1 << bits)
    kind = f"{order}{'uuif'[sample_format]}{bits // 8}" if bits in (8, 16, 32) else ""
    planes = [data[..., c : c + 1] for c in range(channels)] if planar else [data]
    strips = [plane.astype(kind).tobytes() if kind else b"".join(pack_rows(plane, bits)) for plane in planes]
    strips = [zlib.compress(strip) for strip in strips] if compressed else strips
    file = bytearray((b"II" if order == TIFF_LITTLE else b"MM") + struct.pack(order + "HI", 42, 8))

    def directory(strips: list[bytes], is_last: bool) -> None:
        tags: dict[int, tuple[int, list[int]]] = {
            256: (3, [width]),
            257: (3, [height]),
            258: (3, [bits] * channels),
            259: (3, [8 if compressed else 1]),
            262: (3, [photometric]),
            273: (4, [0] * len(strips)),
            274: (3, [orientation]),
            277: (3, [channels]),
            278: (3, [height]),
            279: (4, [len(strip) for strip in strips]),
            284: (3, [2 if planar else 1]),
            317: (3, [2 if predictor else 1]),
            339: (3, [sample_format] * channels),
        }
        if extra is not None:
            tags[338] = (3, [extra])
        if colour_map is not None:
            tags[320] = (3, colour_map.reshape(-1).tolist())
        start = len(file)
        tail = start + 2 + 12 * len(tags) + 4
        blocks = bytearray()
        tags[273] = (4, [tail + sum(map(len, strips[:i])) for i in range(len(strips))])
        blocks += b"".join(strips)
        entries = b""
        for tag, (type_, numbers) in sorted(tags.items()):
            content = struct.pack(f"{order}{len(numbers)}{'HI'[type_ == 4]}", *numbers)
            if len(content) > 4:
                blocks += b"\0" * (len(blocks) % 2)
                place = struct.pack(order + "I", tail + len(blocks))
                blocks += content
            else:
                place = content.ljust(4, b"\0")
            entries += struct.pack(order + "HHI", tag, type_, len(numbers)) + place
        blocks += b"\0" * ((tail + len(blocks)) % 2)
        following = 0 if is_last else tail + len(blocks)
        file.extend(
            struct.pack(order + "H", len(tags)) + entries + struct.pack(order + "I", following) + blocks
        )

    for page in range(pages):
        directory(
            [
                zlib.compress(bytes(10_000)) if page and compressed else bytes(len(s)) if page else s
                for s in strips
            ],
            page == pages - 1,
        )
    return bytes(file)


def bmp(
    rows: list[bytes],
    width: int,
    bits: int,
    *,
    palette: bytes = b"",
    masks: tuple[int, ...] = (),
    top_down: bool = False,
    heading: bool = True,
) -> bytes:
    """A BMP with the header of version 4 where there are `masks`, else 3. `rows` from the top on, not padded."""
    padded = [row + bytes(-len(row) % 4) for row in rows]
    pixels = b"".join(padded if top_down else padded[::-1])
    size = 108 if masks else 40
    height = -len(rows) if top_down else len(rows)
    info = struct.pack(
        "<IiiHHIIiiII",
        size,
        width,
        height,
        1,
        bits,
        3 if masks else 0,
        len(pixels),
        0,
        0,
        len(palette) // 4,
        0,
    )
    if masks:
        info += struct.pack("<4I", *masks, *[0] * (4 - len(masks))) + b"BGRs" + bytes(48)
    start = 14 + len(info) + len(palette)
    header = b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) if heading else b""
    return header + info + palette + pixels


def gif(
    indices: np.ndarray,
    palette: np.ndarray,
    *,
    transparent: int | None = None,
    screen: tuple[int, int] | None = None,
    place: tuple[int, int] = (0, 0),
    background: int = 0,
    frames: int = 1,
) -> bytes:
    """A GIF of indices [H, W] below 256, in LZW codes of 9 bits without compression. Further `frames` are index 0.

    `screen`: (width, height) of the whole, with the first frame at `place`.
    """
    height, width = indices.shape
    table = palette.astype(np.uint8).tobytes().ljust(768, b"\0")
    content = b"GIF89a" + struct.pack("<HHBBB", *(screen or (width, height)), 0xF7, background, 0) + table
    for frame in range(frames):
        flags = 0 if transparent is None else 1
        content += b"!\xf9\x04" + struct.pack("<BHBB", flags, 5, transparent or 0, 0)
        content += b"," + struct.pack("<HHHHB", *place, width, height, 0) + b"\x08"
        flat = (indices if frame == 0 else np.zeros_like(indices)).reshape(-1).tolist()
        codes = [code for i in range(0, len(flat), 250) for code in (256, *flat[i : i + 250])] + [257]
        bits = ((np.array(codes)[:, None] >> np.arange(9)) & 1).astype(np.uint8).reshape(-1)
        data = np.packbits(bits, bitorder="little").tobytes()
        content += b"".join(
            bytes([len(data[i : i + 255])]) + data[i : i + 255] for i in range(0, len(data), 255)
        )
        content += b"\0"
    return content + b";"


def ico(image: bytes, width: int, height: int, bits: int) -> bytes:
    """An icon of one image: a PNG, or a BMP without its first header and with the mask's rows."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, width, height, 0, 0, 1, bits, len(image), 22) + image


def icon_bitmap(rows: list[bytes], mask_rows: list[bytes], width: int, bits: int) -> bytes:
    """A BMP as icons hold it: no file header, twice the height, and the mask's rows after the pixels'."""
    pixels = bmp(rows, width, bits, heading=False)
    mask = b"".join(row + bytes(-len(row) % 4) for row in mask_rows[::-1])
    return pixels[:8] + struct.pack("<i", 2 * len(rows)) + pixels[12:] + mask
