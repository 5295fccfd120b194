"""Fixed-dimensional encodings (MUVERA, arXiv 2405.19504): one long vector a text, whose dot product follows MaxSim.

In each of R repetitions random hyperplanes put every token into one of 2^planes cells. A query's block holds for each cell the
sum of its tokens there, projected to ``inner`` random directions; a document's the mean, or, where a cell is empty, its token
that lies across the fewest planes. Candidates are those of the greatest products, and are then scored exactly. Not to be
brought to length 1: it is the dot product that follows MaxSim. One byte a component is kept: what that loses is far less than
what an encoding does, so an exact search of the encodings would be work for nothing.

``final`` projects encodings, all cells together, to so many components by random signs, which leaves products what they are on
average. The matrix of signs is never made: its rows are those of Hadamard's matrix, none of them twice, with the signs of whole
columns drawn at random, so that two small products of matrices take the place of a large one.

N texts, T tokens, D width, E width of an encoding, C components of all cells, P: C up to a power of two.
"""

from __future__ import annotations

from ctypes import Structure, byref, c_int64
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, model_validator
from scipy.linalg import hadamard

from openembed.config import Config, Count, kind_required
from openembed.index.strings import map_file, named
from openembed.index.tokens.coding import WIDEST, Panel, code_rows, stride_of
from openembed.index.tokens.exact import TokensStructure
from openembed.index.tokens.native import address, check, token_library
from openembed.token_vectors import TokenVectors

BLOCK = 65_536
CODED = 1_024
"""Documents encoded at once."""
WAITING = 2**21
"""Components of encodings that are held at once until they are projected."""
LONGEST = 2**20
"""Greatest number of components that can be projected."""
FILES = ("encodings.u8", "encodings.scales.f32")


class EncodingSettings(Config):
    """The size of encodings: ``repetitions * 2**planes * inner``, 32,768 at most; the paper's best for 2,560 dimensions.

    ``final``: so many components instead, projected from the others, of which there may then be 1,048,576. The seed is part of
    the settings: encodings of other seeds cannot be compared.
    """

    repetitions: int = Field(20, gt=0)
    planes: int = Field(4, ge=0, le=12)
    inner: int = Field(8, gt=0)
    final: int | None = Field(None, gt=0)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> EncodingSettings:
        if self.width > WIDEST:
            hint = "" if self.final else f"; final={WIDEST // 8:,} projects them to fewer"
            raise ValueError(f"encodings of {self.width:,} components; at most {WIDEST:,} are possible{hint}")
        if self.final is not None and not self.final <= self.components <= LONGEST:
            raise ValueError(
                f"final is {self.final:,} of {self.components:,} components (repetitions * 2**planes * inner); "
                f"it must be no greater than these, and these {LONGEST:,} at most"
            )
        return self

    @property
    def components(self) -> int:
        """Components of all cells, before they are projected."""
        return self.repetitions * 2**self.planes * self.inner

    @property
    def width(self) -> int:
        """Components of an encoding."""
        return self.final or self.components


class Muvera(Config, json_schema_extra=kind_required):
    """How encodings are searched: so many ``candidates`` go on to be scored exactly."""

    kind: Literal["muvera"] = "muvera"
    candidates: Count = 500


class _Cells(Structure):
    _fields_ = tuple((name, c_int64) for name in ("repetitions", "planes", "inner", "document"))


def encode_fixed(vectors: TokenVectors, settings: EncodingSettings, *, document: bool) -> np.ndarray:
    """Returns float32 (N, E): encodings of documents, or of queries; of a text without tokens, zeros."""
    map_DM = _projection(vectors.width, settings)
    out_NE = np.zeros((len(vectors), settings.width), dtype=np.float32)
    ends = vectors.offsets_N1[1:]
    most = max(1, WAITING // settings.components)
    first = 0
    while first < len(vectors):
        low = vectors.offsets_N1[first]
        last = min(first + most, max(first + 1, int(np.searchsorted(ends, low + BLOCK, side="right"))))
        values_TD = np.asarray(vectors.values_TD[low : vectors.offsets_N1[last]], dtype=np.float32)
        offsets = np.ascontiguousarray(vectors.offsets_N1[first : last + 1] - low, dtype=np.int64)
        part_NE = out_NE[first:last]
        part_NC = np.zeros((last - first, settings.components), dtype=np.float32) if settings.final else part_NE
        _encode(np.ascontiguousarray(values_TD @ map_DM), offsets, settings, document, part_NC)
        if settings.final:
            part_NE[:] = _projected(part_NC, settings.final, settings.seed)
        first = last
    return out_NE


@lru_cache(maxsize=16)
def _projection(width: int, settings: EncodingSettings) -> np.ndarray:
    """Returns float32 (D, R * (planes + inner)): for each repetition Gaussian planes, then signs over the root of ``inner``."""
    random = np.random.default_rng(settings.seed)
    planes = random.standard_normal((width, settings.repetitions, settings.planes))
    signs = random.choice([-1.0, 1.0], (width, settings.repetitions, settings.inner)) / settings.inner**0.5
    return np.concatenate([planes, signs], axis=2).reshape(width, -1).astype(np.float32)


def _projected(values_NC: np.ndarray, final: int, seed: int) -> np.ndarray:
    """Returns float32 (N, final): products with vectors of random signs, over the root of their number."""
    components = values_NC.shape[1]
    signs_C, rows_E, left, right = _signs(components, final, seed)
    wide_NP = np.zeros((len(values_NC), len(left) * len(right)), dtype=np.float32)
    np.multiply(values_NC, signs_C, out=wide_NP[:, :components])
    made = left @ (wide_NP.reshape(-1, len(right)) @ right).reshape(-1, len(left), len(right))
    return made.reshape(wide_NP.shape)[:, rows_E]


@lru_cache(maxsize=16)
def _signs(components: int, final: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns signs and rows, both drawn apart from the planes, and Hadamard's matrix as two factors, the right one scaled."""
    random, order = np.random.default_rng((seed, 1)), (components - 1).bit_length()
    signs_C = random.choice(np.array([-1, 1], dtype=np.float32), components)
    left, right = (hadamard(2**part).astype(np.float32) for part in (order // 2, order - order // 2))
    return signs_C, random.permutation(2**order)[:final], left, right * np.float32(final**-0.5)


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
