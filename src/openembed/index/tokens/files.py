"""A segment's token vectors on disk: written once, then memory-mapped.

    tokens.json                   what follows, and how it was made; written last
    tokens.offsets.npy            int64 (N + 1): where each document's tokens start
    tokens.values.f16 or .f32     (T, D)
    tokens.codes.u8, .scales.f32  the vectors as bytes, and the scale of each
    tokens.bounds.f32             (N, 2): what that loses at most of a document's tokens, and their greatest norm
    residuals.*                   see ``codec``; of a segment of ``coded_from`` tokens or more
    encodings.*                   see ``muvera``

N documents, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from openembed.config import Config, parse
from openembed.files import read_json, write_json
from openembed.index.strings import load_array, map_file, named, save_array
from openembed.index.tokens.codec import (
    Codec,
    Residuals,
    check_count,
    clusters_for,
    encode_tokens,
    map_residuals,
    write_residuals,
)
from openembed.index.tokens.coding import WIDEST, check_vectors, code_rows, document_bounds, stride_of
from openembed.index.tokens.exact import TokenMatrix
from openembed.index.tokens.muvera import Encodings, EncodingSettings, map_encodings, write_encodings
from openembed.token_vectors import TokenVectors

CODED_FROM = 2_000_000
"""Up to so many tokens exact search is fast enough that coding is not worth its time."""


class TokenCoding(Config):
    """What a segment has for approximate search, beside or in the place of its token vectors.

    ``bits``: of the residuals that segments of ``coded_from`` tokens or more are given (2 are enough where vectors are kept
    too); 0: none are. ``clusters``: centroids, None: by the number of tokens. ``keep_vectors``: False lets coded segments hold
    their residuals alone. ``encodings``: also one long vector a document.
    """

    bits: Literal[0, 2, 4] = 2
    coded_from: int = Field(CODED_FROM, ge=1)
    clusters: int | None = Field(None, gt=0)
    keep_vectors: bool = True
    encodings: EncodingSettings | None = None

    @model_validator(mode="after")
    def _something_kept(self) -> TokenCoding:
        if not self.keep_vectors and not self.bits:
            raise ValueError("without vectors there must be residuals: give bits (2 or 4) with keep_vectors=False")
        return self


class TokenSettings(TokenCoding):
    """How a segment keeps its token vectors. ``precision``: of the vectors on disk; all scores are those of the vectors as
    kept."""

    precision: Literal["float16", "float32"] = "float16"


class TokenInfo(Config):
    """What ``tokens.json`` says of a segment."""

    width: int = Field(gt=0, le=WIDEST)
    count: int = Field(ge=0)
    tokens: int = Field(ge=0)
    precision: Literal["float16", "float32"]
    vectors: bool
    bits: Literal[2, 4] | None = None
    unit: bool = False
    encodings: EncodingSettings | None = None


class TokenWriter:
    """Writes documents' token vectors, a chunk at a time, into the folder of a segment, made where there is none."""

    def __init__(self, directory: str | Path, width: int, settings: TokenSettings | None = None) -> None:
        directory = Path(directory)
        if not 1 <= width <= WIDEST:
            raise ValueError(f"token vectors of width {width}; from 1 to {WIDEST:,} can be kept")
        self._directory, self._width, self._settings = directory, width, settings or TokenSettings()
        self._type = np.dtype(self._settings.precision)
        names = (values_name(self._settings.precision), "tokens.codes.u8", "tokens.scales.f32", "tokens.bounds.f32")
        directory.mkdir(parents=True, exist_ok=True)
        self._files = [(directory / name, (directory / name).open("wb")) for name in names]
        self._lengths: list[np.ndarray] = []
        self._tokens = 0

    def add(self, documents: TokenVectors, name: Callable[[int], str] = "document {}".format) -> None:
        """Appends documents. Raises ``ValueError`` for another width, what is not finite and what the precision cannot hold
        (``name`` says which of them it is), and for more tokens than can be coded, where they are to be.
        """
        check_vectors(documents, self._width, name)
        if self._settings.bits:
            check_count(self._tokens + len(documents.values_TD))
        values_TD = np.ascontiguousarray(documents.values_TD, dtype=np.float32)
        if self._type == np.float16 and len(values_TD) and np.abs(values_TD).max() > np.finfo(np.float16).max:
            raise ValueError("a token vector has a component beyond 65,504; use precision='float32' or scale the vectors down")
        kept_TD = values_TD.astype(self._type)
        rows = code_rows(kept_TD.astype(np.float32))
        bounds_N2 = document_bounds(rows, documents.offsets_N1)
        self._lengths.append(documents.lengths_N)
        self._tokens += len(values_TD)
        for (path, file), array in zip(self._files, (kept_TD, rows.codes_TS, rows.scale_T, bounds_N2), strict=True):
            with named(path):
                file.write(memoryview(array.reshape(-1)).cast("B") if array.size else b"")

    def close(self, advance: Callable[[int], None] = lambda _n: None) -> TokenInfo:
        """Writes what is left; of a large segment trains centroids and codes its tokens (``advance`` counts these)."""
        for path, file in self._files:
            with named(path):
                file.close()
        lengths_N = np.concatenate([np.empty(0, np.int64), *self._lengths])
        offsets_N1 = np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int64)
        save_array(self._directory / "tokens.offsets.npy", offsets_N1)
        info = self._finish(offsets_N1, advance)
        write_json(self._directory / "tokens.json", info.model_dump(exclude_none=True))
        return info

    def _finish(self, offsets_N1: np.ndarray, advance: Callable[[int], None]) -> TokenInfo:
        settings, tokens, path = self._settings, int(offsets_N1[-1]), self._files[0][0]
        values_TD = map_file(path, self._type, (tokens, self._width))
        fields = {"width": self._width, "count": len(offsets_N1) - 1, "tokens": tokens, "precision": settings.precision}
        if settings.encodings is not None:
            write_encodings(self._directory, TokenVectors(values_TD, offsets_N1), settings.encodings)
        coded = settings.bits > 0 and tokens >= settings.coded_from
        codec = None
        if coded:
            clusters = min(settings.clusters or clusters_for(tokens), tokens)
            codec = Codec.train(values_TD, clusters, settings.bits)
            write_residuals(self._directory, encode_tokens(codec, values_TD, offsets_N1, advance))
        if coded and not settings.keep_vectors:
            del values_TD
            for path, _ in self._files:
                path.unlink()
        fields |= {"bits": settings.bits if coded else None, "unit": codec is not None and codec.unit}
        return TokenInfo(**fields, vectors=settings.keep_vectors or not coded, encodings=settings.encodings)


class TokenSegment:
    """A segment's token vectors, memory-mapped; nothing is loaded before it is needed.

    Raises ``ValueError`` naming a file that is missing, damaged, or does not fit ``count`` documents.
    """

    def __init__(self, directory: str | Path, count: int | None = None) -> None:
        directory = Path(directory)
        path = directory / "tokens.json"
        if not path.exists():
            raise ValueError(f"{path}: missing; the index is damaged, build it anew")
        self.directory = directory
        self.info = info = parse(TokenInfo, read_json(path), str(path))
        self.offsets_N1 = _offsets(directory / "tokens.offsets.npy", info)
        if count is not None and info.count != count:
            raise ValueError(f"{path}: {info.count} documents where {count} are needed; it is damaged, build the index anew")
        if info.vectors:
            _ = self.matrix
        elif info.bits is None:
            raise ValueError(f"{path}: neither vectors nor residuals; it is damaged, build the index anew")

    def __len__(self) -> int:
        return self.info.count

    @cached_property
    def matrix(self) -> TokenMatrix | None:
        """The vectors with their codes; None where only residuals are kept."""
        info, folder = self.info, self.directory
        if not info.vectors:
            return None
        values_TD = map_file(folder / values_name(info.precision), np.dtype(info.precision), (info.tokens, info.width))
        codes_TS = map_file(folder / "tokens.codes.u8", np.uint8, (info.tokens, stride_of(info.width)))
        scale_T = map_file(folder / "tokens.scales.f32", np.float32, (info.tokens,))
        return TokenMatrix(values_TD, self.offsets_N1, codes_TS, scale_T, self._bounds())

    @cached_property
    def residuals(self) -> Residuals | None:
        """The coded tokens; None where the segment was too small for them."""
        info = self.info
        return map_residuals(self.directory, self.offsets_N1, info.width, info.bits, info.unit) if info.bits else None

    @cached_property
    def encodings(self) -> Encodings | None:
        """One long vector a document; None where there are none."""
        return None if self.info.encodings is None else map_encodings(self.directory, self.info.count, self.info.encodings)

    def vectors(self, documents: np.ndarray) -> TokenVectors:
        """Returns the token vectors of documents, as kept, or reconstructed where only residuals are; what merging copies."""
        lengths_C = np.diff(self.offsets_N1)[documents]
        offsets_C1 = np.concatenate([[0], np.cumsum(lengths_C)]).astype(np.int64)
        tokens = np.arange(offsets_C1[-1]) + np.repeat(self.offsets_N1[:-1][documents] - offsets_C1[:-1], lengths_C)
        values = self.matrix.values_TD[tokens] if self.matrix is not None else self.residuals.reconstruct(tokens)
        return TokenVectors(values.astype(np.float32), offsets_C1)

    def _bounds(self) -> np.ndarray:
        return map_file(self.directory / "tokens.bounds.f32", np.float32, (self.info.count, 2))


def values_name(precision: str) -> str:
    """Returns the name of the file of the vectors."""
    return f"tokens.values.{'f16' if precision == 'float16' else 'f32'}"


def _offsets(path: Path, info: TokenInfo) -> np.ndarray:
    """Returns the offsets, checked: what they say is read without a further check."""
    offsets_N1 = np.array(load_array(path))
    fits = offsets_N1.shape == (info.count + 1,) and offsets_N1.dtype == np.int64
    if not fits or offsets_N1[0] != 0 or offsets_N1[-1] != info.tokens or (np.diff(offsets_N1) < 0).any():
        raise ValueError(
            f"{path}: damaged, it does not fit {info.count} documents of {info.tokens} tokens; build the index anew"
        )
    return offsets_N1
