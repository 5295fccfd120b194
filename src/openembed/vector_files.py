"""The files of encoded vectors: their names, their bytes, and opening them memory-mapped.

OUT/vectors.npy   float32 (N, D), opens with ``numpy.load(..., mmap_mode="r")``; see :mod:`openembed.vectors` for others
OUT/scales.npy    float32 (N,), with int8 vectors alone
OUT/ids.jsonl     one id a line, as JSON strings, in the order of the vectors
OUT/meta.json     how they were made; written last: where it is, the others are whole
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openembed.vectors import StoredVectors

VECTORS, SCALES, IDS, META = "vectors.npy", "scales.npy", "ids.jsonl", "meta.json"
PARTIAL = ".partial"


@dataclass(frozen=True)
class StoredArray:
    """One ``.npy`` file of the output, written row by row: its name, dtype and shape."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def header(self) -> bytes:
        """The bytes before the first row."""
        buffer = io.BytesIO()
        descr = np.lib.format.dtype_to_descr(self.dtype)
        np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": self.shape})
        return buffer.getvalue()

    @property
    def row_bytes(self) -> int:
        """Bytes a row."""
        return self.dtype.itemsize * math.prod(self.shape[1:])

    def offset(self, row: int) -> int:
        """Returns where a row begins; for the number of rows, the size of the whole file."""
        return len(self.header) + self.row_bytes * row

    def partial(self, out: Path) -> Path:
        """Returns where it lies until it is whole."""
        return out / (self.name + PARTIAL)


def stored_arrays(plan: dict[str, Any]) -> list[StoredArray]:
    """Returns the arrays that ``plan`` writes: vectors, and for int8 their scales."""
    dtype, columns = np.dtype(plan["dtype"]).newbyteorder("<"), plan["width"]
    columns = columns // 8 if dtype == np.uint8 else columns
    vectors = StoredArray(VECTORS, dtype, (plan["count"], columns))
    return [vectors, StoredArray(SCALES, np.dtype("<f4"), (plan["count"],))] if dtype == np.int8 else [vectors]


def open_vectors(directory: str | Path) -> StoredVectors:
    """Returns the memory-mapped vectors of a finished output; ``ValueError`` names a file that is missing or damaged."""
    directory = Path(directory)
    values_NC = _mapped(directory / VECTORS)
    return StoredVectors(values_NC, _mapped(directory / SCALES) if values_NC.dtype == np.int8 else None)


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); encode it anew") from None


def check_whole(arrays: list[StoredArray], out: Path) -> None:
    """Raises ``ValueError`` naming the files of a finished output that are missing or not as long as they must be."""
    sizes = {out / array.name: array.offset(array.shape[0]) for array in arrays}
    cut = [path.name for path, size in sizes.items() if not path.exists() or path.stat().st_size != size]
    if cut or not (out / IDS).exists():
        raise ValueError(f"{out}: {', '.join(cut) or IDS} is missing or cut short; pass --restart to encode anew")
