"""PNG pictures from arrays with zlib alone: heat maps need neither a plotting library nor its dependencies."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
"""[height, width, 3] uint8: red, green, blue."""
Color = tuple[int, int, int]

WHITE: Final[Color] = (255, 255, 255)
INK: Final[Color] = (31, 41, 55)
QUIET: Final[Color] = (107, 114, 128)

RAMP: Final[Sequence[Color]] = (
    (240, 244, 239),
    (199, 228, 213),
    (127, 199, 194),
    (58, 153, 180),
    (33, 103, 155),
    (28, 58, 116),
    (14, 22, 60),
)
"""From none to most: lightness falls evenly, so that it reads the same without colour vision and in grey."""

GLYPH_WIDTH, GLYPH_HEIGHT = 5, 7
_GLYPHS: Final[dict[str, str]] = {
    " ": "00000000000000",
    "%": "18190204081303",
    "(": "02040808080402",
    ")": "08040202020408",
    "+": "0004041f040400",
    ",": "00000000040408",
    "-": "0000001f000000",
    ".": "00000000000c0c",
    "/": "01010204081010",
    ":": "000c0c000c0c00",
    "=": "00001f001f0000",
    "0": "0e11131519110e",
    "1": "040c040404040e",
    "2": "0e11010204081f",
    "3": "1f02040201110e",
    "4": "02060a121f0202",
    "5": "1f101e0101110e",
    "6": "0608101e11110e",
    "7": "1f010204080808",
    "8": "0e11110e11110e",
    "9": "0e11110f01020c",
    "A": "0e11111f111111",
    "B": "1e11111e11111e",
    "C": "0e11101010110e",
    "D": "1c12111111121c",
    "E": "1f10101e10101f",
    "F": "1f10101e101010",
    "G": "0e11101711110f",
    "H": "1111111f111111",
    "I": "0e04040404040e",
    "J": "0702020202120c",
    "K": "11121418141211",
    "L": "1010101010101f",
    "M": "111b1515111111",
    "N": "11111915131111",
    "O": "0e11111111110e",
    "P": "1e11111e101010",
    "Q": "0e11111115120d",
    "R": "1e11111e141211",
    "S": "0f10100e01011e",
    "T": "1f040404040404",
    "U": "1111111111110e",
    "V": "11111111110a04",
    "W": "1111111515150a",
    "X": "11110a040a1111",
    "Y": "1111110a040404",
    "Z": "1f01020408101f",
    "_": "0000000000001f",
}
"""Rows of 5 bits from the top, as hexadecimal bytes; letters are capitals."""


def png_bytes(pixels: Pixels) -> bytes:
    """A PNG file, 8 bits per channel, of `pixels [H, W, 3] uint8`."""
    height, width, channels = pixels.shape
    assert channels == 3 and pixels.dtype == np.uint8, "pixels are [H, W, 3] uint8"
    rows = np.zeros((height, 1 + 3 * width), dtype=np.uint8)  # a filter byte of 0 leads each row: no filter
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def blank(height: int, width: int) -> Pixels:
    """White pixels."""
    return np.full((height, width, 3), 255, dtype=np.uint8)


def shades(values: NDArray[np.float64], most: float) -> Pixels:
    """`values [H, W]` of 0..most through RAMP."""
    stops = np.asarray(RAMP, dtype=np.float64)
    place = np.clip(values / most if most > 0 else np.zeros_like(values), 0, 1) * (len(stops) - 1)
    below = np.minimum(place.astype(np.int64), len(stops) - 2)
    part = (place - below)[..., None]
    mixed: Pixels = np.rint(stops[below] * (1 - part) + stops[below + 1] * part).astype(np.uint8)
    return mixed


def text_width(text: str, scale: int) -> int:
    """Pixels from the first to the last column of `text`."""
    return (len(text) * (GLYPH_WIDTH + 1) - 1) * scale


def write_text(pixels: Pixels, text: str, *, top: int, left: int, scale: int = 2, color: Color = INK) -> None:
    """Write one line into `pixels`; what has no glyph is left blank, what lies outside is cut off."""
    for number, letter in enumerate(text.upper()):
        rows = bytes.fromhex(_GLYPHS.get(letter, _GLYPHS[" "]))
        bits = np.unpackbits(np.frombuffer(rows, dtype=np.uint8)[:, None], axis=1)[:, -GLYPH_WIDTH:].astype(bool)
        large = bits.repeat(scale, axis=0).repeat(scale, axis=1)
        x = left + number * (GLYPH_WIDTH + 1) * scale
        part = pixels[max(top, 0) : top + large.shape[0], max(x, 0) : x + large.shape[1]]
        part[large[: part.shape[0], : part.shape[1]]] = color


def paste(pixels: Pixels, picture: Pixels, *, top: int, left: int) -> None:
    """Copy `picture` into `pixels`."""
    pixels[top : top + picture.shape[0], left : left + picture.shape[1]] = picture


def enlarge(picture: Pixels, height: int, width: int) -> Pixels:
    """Each pixel as a block of height × width."""
    return picture.repeat(height, axis=0).repeat(width, axis=1)
