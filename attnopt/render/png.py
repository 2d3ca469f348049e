"""Small pictures of numbers from 0 to 1, as PNG files inside a page."""

from __future__ import annotations

import struct
import zlib
from base64 import b64encode

import numpy as np
from numpy.typing import NDArray

LEVELS = 32  # of opacity
COLOUR = (59, 130, 246)  # legible on light and on dark ground


def data_uri(levels: NDArray[np.float64]) -> str:
    """[rows, columns] from 0, transparent, to 1."""
    return f"data:image/png;base64,{b64encode(png(levels)).decode()}"


def png(levels: NDArray[np.float64]) -> bytes:
    """With a palette of one colour in ``LEVELS`` opacities."""
    cells = np.clip(np.rint(levels * (LEVELS - 1)), 0, LEVELS - 1).astype(np.uint8)
    height, width = cells.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), cells], 1)  # each behind the number of its filter
    opacity = bytes(round(255 * i / (LEVELS - 1)) for i in range(LEVELS))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", bytes(COLOUR) * LEVELS),
        (b"tRNS", opacity),
        (b"IDAT", zlib.compress(rows.tobytes(), 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
