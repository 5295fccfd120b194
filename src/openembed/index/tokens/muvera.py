"""Fixed-dimensional encodings (MUVERA, arXiv 2405.19504): one long vector a text, whose dot product follows MaxSim.

In each of R repetitions random hyperplanes put every token into one of 2^planes cells. A query's block holds for each cell the
sum of its tokens there, projected to ``inner`` random directions; a document's the mean, or, where a cell is empty, its token
that lies across the fewest planes. Candidates come from dense search over these vectors and are then scored exactly. Not to be
brought to length 1: it is the dot product that follows MaxSim.

N texts, T tokens, D width, E width of an encoding.
"""

from __future__ import annotations

from ctypes import Structure, byref, c_int64
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field

from openembed.config import Config
from openembed.index.codes import LANES, Codes, groups_of, quantize, steps_of
from openembed.index.dense import Vectors
from openembed.index.strings import map_file, named
from openembed.index.tokens.native import address, check, token_library
from openembed.token_vectors import TokenVectors

BLOCK = 65_536
FILES = ("encodings.f32", "encodings.codes.u8", "encodings.bounds.f32")


class EncodingSettings(Config):
    """The size of encodings: ``repetitions * 2**planes * inner``; the paper's best for 2,560 dimensions. The seed is part of
    them: encodings of other seeds cannot be compared.
    """

    repetitions: int = Field(20, gt=0)
    planes: int = Field(4, ge=0, le=12)
    inner: int = Field(8, gt=0)
    seed: int = 0

    @property
    def width(self) -> int:
        """Components of an encoding."""
        return self.repetitions * 2**self.planes * self.inner


@dataclass(frozen=True)
class Encoded:
    """How encodings are searched: so many ``candidates`` go on to be scored exactly."""

    candidates: int = 500

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise ValueError(f"candidates must be 1 or more, got {self.candidates}")


class _Cells(Structure):
    _fields_ = tuple((name, c_int64) for name in ("repetitions", "planes", "inner", "document"))


def encode_fixed(vectors: TokenVectors, settings: EncodingSettings, *, document: bool) -> np.ndarray:
    """Returns float32 (N, E): encodings of documents, or of queries; of a text without tokens, zeros."""
    map_DM = _projection(vectors.width, settings)
    out_NE = np.zeros((len(vectors), settings.width), dtype=np.float32)
    ends = vectors.offsets_N1[1:]
    first = 0
    while first < len(vectors):
        low = vectors.offsets_N1[first]
        last = max(first + 1, int(np.searchsorted(ends, low + BLOCK, side="right")))
        values_TD = np.asarray(vectors.values_TD[low : vectors.offsets_N1[last]], dtype=np.float32)
        offsets = np.ascontiguousarray(vectors.offsets_N1[first : last + 1] - low, dtype=np.int64)
        _encode(np.ascontiguousarray(values_TD @ map_DM), offsets, settings, document, out_NE[first:last])
        first = last
    return out_NE


def _projection(width: int, settings: EncodingSettings) -> np.ndarray:
    """Returns float32 (D, R * (planes + inner)): in each repetition Gaussian planes, then random signs over the root of ``inner``."""
    random = np.random.default_rng(settings.seed)
    planes = random.standard_normal((width, settings.repetitions, settings.planes))
    signs = random.choice([-1.0, 1.0], (width, settings.repetitions, settings.inner)) / settings.inner**0.5
    return np.concatenate([planes, signs], axis=2).reshape(width, -1).astype(np.float32)


def _encode(projected: np.ndarray, offsets: np.ndarray, settings: EncodingSettings, document: bool, out_NE: np.ndarray) -> None:
    library, shape = token_library(), (settings.repetitions, settings.planes, settings.inner)
    if library is not None:
        cells = _Cells(*shape, document)
        texts = len(offsets) - 1
        check(library.openembed_fixed_encodings(address(projected), address(offsets), texts, byref(cells), address(out_NE)))
        return
    parts = projected.reshape(len(projected), settings.repetitions, -1)
    bits = (parts[:, :, : settings.planes] > 0) @ (1 << np.arange(settings.planes))
    out = out_NE.reshape(len(out_NE), settings.repetitions, 2**settings.planes, settings.inner)
    cells = np.arange(2**settings.planes)
    for text in np.flatnonzero(np.diff(offsets)):
        rows = slice(offsets[text], offsets[text + 1])
        for repetition in range(settings.repetitions):
            ids, points = bits[rows, repetition], parts[rows, repetition, settings.planes :]
            np.add.at(out[text, repetition], ids, points)
            if document:
                counts = np.bincount(ids, minlength=len(cells))
                apart = np.bitwise_count(cells[:, None] ^ ids[None])
                filled = points[apart.argmin(axis=1)]
                means = out[text, repetition] / np.maximum(counts, 1)[:, None]
                out[text, repetition] = np.where(counts[:, None] > 0, means, filled)


def write_encodings(directory: Path, vectors: TokenVectors, settings: EncodingSettings) -> None:
    """Writes the encodings of a segment's documents, and their codes, into its folder, a block at a time."""
    bounds, step = [], max(LANES, BLOCK // settings.width * LANES)
    paths = [directory / name for name in FILES]
    with named(paths[0]), paths[0].open("wb") as values_file, named(paths[1]), paths[1].open("wb") as codes_file:
        for start in range(0, len(vectors), step):
            stop = min(start + step, len(vectors))
            low, high = vectors.offsets_N1[start], vectors.offsets_N1[stop]
            part = TokenVectors(vectors.values_TD[low:high], vectors.offsets_N1[start : stop + 1] - low)
            block_NE = encode_fixed(part, settings, document=True)
            codes = quantize(block_NE)
            values_file.write(memoryview(block_NE).cast("B"))
            codes_file.write(memoryview(codes.codes_GS).cast("B"))
            bounds.append(codes.bounds_3P)
    with named(paths[2]), paths[2].open("wb") as file:
        file.write(np.concatenate(bounds, axis=1).tobytes() if bounds else b"")


def map_encodings(directory: Path, count: int, settings: EncodingSettings) -> tuple[np.ndarray, Codes]:
    """Returns memory-mapped encodings (N, E) and their codes; ``ValueError`` names a file that is missing or of a wrong size."""
    values, codes, bounds = (directory / name for name in FILES)
    groups = groups_of(count)
    found = Codes(
        map_file(codes, np.uint8, (groups, steps_of(settings.width), LANES, 4)), map_file(bounds, np.float32, (3, groups * LANES))
    )
    return map_file(values, np.float32, (count, settings.width)), found


def as_vectors(encodings: tuple[np.ndarray, Codes], eligible_N: np.ndarray) -> Vectors:
    """Returns encodings as dense search takes them."""
    return Vectors(encodings[0], eligible_N, encodings[1])
