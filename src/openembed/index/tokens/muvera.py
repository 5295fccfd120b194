"""Fixed-dimensional encodings (MUVERA, arXiv 2405.19504): one long vector a text, whose dot product follows MaxSim.

In each of R repetitions random hyperplanes put every token into one of 2^planes cells. A query's block holds for each cell the
sum of its tokens there, projected to ``inner`` random directions; a document's the mean, or, where a cell is empty, its token
that lies across the fewest planes. Candidates are those of the greatest products, and are then scored exactly. Not to be
brought to length 1: it is the dot product that follows MaxSim. One byte a component is kept: what that loses is far less than
what an encoding does, so an exact search of the encodings would be work for nothing.

N texts, T tokens, D width, E width of an encoding.
"""

from __future__ import annotations

from ctypes import Structure, byref, c_int64
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from pydantic import Field, model_validator

from openembed.config import Config
from openembed.index.strings import map_file, named
from openembed.index.tokens.coding import WIDEST, Panel, code_rows, stride_of
from openembed.index.tokens.exact import TokensStructure
from openembed.index.tokens.native import address, check, token_library
from openembed.token_vectors import TokenVectors

BLOCK = 65_536
CODED = 1_024
"""Documents encoded at once."""
FILES = ("encodings.u8", "encodings.scales.f32")


class EncodingSettings(Config):
    """The size of encodings: ``repetitions * 2**planes * inner``, 32,768 at most; the paper's best for 2,560 dimensions.

    The seed is part of them: encodings of other seeds cannot be compared.
    """

    repetitions: int = Field(20, gt=0)
    planes: int = Field(4, ge=0, le=12)
    inner: int = Field(8, gt=0)
    seed: int = 0

    @model_validator(mode="after")
    def _fits(self) -> EncodingSettings:
        if self.width > WIDEST:
            raise ValueError(f"encodings of {self.width:,} components; at most {WIDEST:,} are possible")
        return self

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
    """Returns float32 (D, R * (planes + inner)): for each repetition Gaussian planes, then signs over the root of ``inner``."""
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
    parts = projected.reshape(len(projected), settings.repetitions, settings.planes + settings.inner)
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


@dataclass
class Encodings:
    """The encodings of a segment's documents, one byte a component: ``codes_NE`` is component / ``scale_N`` + 128."""

    codes_NE: np.ndarray
    scale_N: np.ndarray
    settings: EncodingSettings

    def candidates(self, query: TokenVectors, eligible_N: np.ndarray, count: int) -> np.ndarray:
        """Returns the positions of the ``count`` eligible documents of greatest product of encodings with the query's."""
        chosen = np.flatnonzero(eligible_N)
        if len(chosen) <= count:
            return chosen
        scores = self._products(encode_fixed(query, self.settings, document=False), chosen)
        return chosen[np.argpartition(-scores, count - 1)[:count]]

    def _products(self, query_1E: np.ndarray, documents: np.ndarray) -> np.ndarray:
        library = token_library()
        if library is None:
            parts = np.split(documents, range(CODED, len(documents), CODED))
            codes = [(self.codes_NE[part].astype(np.float32) - 128)[:, : query_1E.shape[1]] @ query_1E[0] for part in parts]
            return np.concatenate(codes) * self.scale_N[documents]
        panel, scores = Panel(TokenVectors(query_1E, np.array([0, 1]))), np.empty(len(documents), dtype=np.float32)
        arguments = byref(self._structure), panel.pointer, address(documents), len(documents), address(scores)
        check(library.openembed_tokens_scan(*arguments))
        return scores

    @cached_property
    def _structure(self) -> TokensStructure:
        """The encodings as documents of one token each."""
        self._offsets = np.arange(len(self.scale_N) + 1, dtype=np.int64)
        arrays = self.codes_NE, self.scale_N, None, None, self._offsets
        return TokensStructure(*map(address, arrays), self.codes_NE.shape[1], self.settings.width, 0)


def write_encodings(directory: Path, vectors: TokenVectors, settings: EncodingSettings) -> None:
    """Writes the encodings of a segment's documents into its folder, a block at a time."""
    paths = [directory / name for name in FILES]
    with named(paths[0]), paths[0].open("wb") as codes_file, named(paths[1]), paths[1].open("wb") as scales_file:
        for start in range(0, len(vectors), CODED):
            stop = min(start + CODED, len(vectors))
            low, high = vectors.offsets_N1[start], vectors.offsets_N1[stop]
            part = TokenVectors(vectors.values_TD[low:high], vectors.offsets_N1[start : stop + 1] - low)
            rows = code_rows(encode_fixed(part, settings, document=True))
            codes_file.write(memoryview(rows.codes_TS).cast("B"))
            scales_file.write(memoryview(rows.scale_T).cast("B"))


def map_encodings(directory: Path, count: int, settings: EncodingSettings) -> Encodings:
    """Returns memory-mapped encodings; ``ValueError`` names a file that is missing or of a wrong size."""
    codes, scales = (directory / name for name in FILES)
    shape = count, stride_of(settings.width)
    return Encodings(map_file(codes, np.uint8, shape), map_file(scales, np.float32, (count,)), settings)
