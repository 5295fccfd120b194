"""The files of encoded vectors: their names, their bytes, and opening them memory-mapped.

    OUT/ids.jsonl     one id a line, as JSON strings, in the order of the vectors
    OUT/meta.json     how they were made; written last: where it is, the others are whole

Arrays open with ``numpy.load(..., mmap_mode="r")``. Of dense vectors:

    OUT/vectors.npy   float32 (N, D); see :mod:`openembed.vectors` for others
    OUT/scales.npy    float32 (N,), with int8 vectors alone

Of sparse ones (``meta.json``: ``"representation": "sparse"``, ``width``: V), compressed rows as scipy has them:

    OUT/indptr.npy    int64 (N + 1): text i has the entries indptr[i] to indptr[i + 1]
    OUT/indices.npy   int32 (P,): terms, ascending in each text
    OUT/data.npy      float32 (P,): their weights

Of token vectors (``"representation": "tokens"``), all texts' end to end:

    OUT/offsets.npy   int64 (N + 1): text i has the rows offsets[i] to offsets[i + 1]
    OUT/vectors.npy   float32 or float16 (T, D)
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.sparse import csr_matrix

from openembed.files import read_json
from openembed.token_vectors import TokenVectors
from openembed.vectors import StoredVectors

VECTORS, SCALES, IDS, META = "vectors.npy", "scales.npy", "ids.jsonl", "meta.json"
INDPTR, INDICES, DATA, OFFSETS = "indptr.npy", "indices.npy", "data.npy", "offsets.npy"
ARRAYS = (VECTORS, SCALES, INDPTR, INDICES, DATA, OFFSETS)
PARTIAL = ".partial"
ENDS = np.dtype("<i8")


@dataclass(frozen=True)
class StoredArray:
    """One ``.npy`` file of the output, written row by row: its name, dtype and shape.

    ``rows``: what has a row. Of ``ends`` each text has one, where its entries end, after a 0 for the first one's beginning; of
    ``entries`` nobody knows how many there will be until the last text is encoded.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    rows: Literal["texts", "ends", "entries"] = "texts"

    @property
    def header(self) -> bytes:
        """The bytes before the first row; of the same length whatever the number of rows."""
        buffer = io.BytesIO()
        descr = np.lib.format.dtype_to_descr(self.dtype)
        np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": self.shape})
        return buffer.getvalue() + (bytes(self.row_bytes) if self.rows == "ends" else b"")

    @property
    def size(self) -> int:
        """The bytes of the whole file."""
        return self.offset(self.shape[0] - (self.rows == "ends"))

    @property
    def row_bytes(self) -> int:
        """Bytes a row."""
        return self.dtype.itemsize * math.prod(self.shape[1:])

    def offset(self, row: int) -> int:
        """Returns where a row begins; for the number of rows, where the file ends."""
        return len(self.header) + self.row_bytes * row

    def partial(self, out: Path) -> Path:
        """Returns where it lies until it is whole."""
        return out / (self.name + PARTIAL)


def stored_arrays(plan: dict[str, Any]) -> list[StoredArray]:
    """Returns the arrays that ``plan`` writes: vectors, and for int8 their scales; of other kinds see above.

    Without ``entries`` in the plan those arrays have none yet.
    """
    kind, ends, entries = plan.get("representation", "dense"), (plan["count"] + 1,), plan.get("entries", 0)
    if kind == "sparse":
        indices = StoredArray(INDICES, np.dtype("<i4"), (entries,), "entries")
        return [StoredArray(INDPTR, ENDS, ends, "ends"), indices, StoredArray(DATA, np.dtype("<f4"), (entries,), "entries")]
    if kind == "tokens":
        values = StoredArray(VECTORS, np.dtype(plan["dtype"]).newbyteorder("<"), (entries, plan["width"]), "entries")
        return [StoredArray(OFFSETS, ENDS, ends, "ends"), values]
    dtype, columns = np.dtype(plan["dtype"]).newbyteorder("<"), plan["width"]
    columns = columns // 8 if dtype == np.uint8 else columns
    vectors = StoredArray(VECTORS, dtype, (plan["count"], columns))
    return [vectors, StoredArray(SCALES, np.dtype("<f4"), (plan["count"],))] if dtype == np.int8 else [vectors]


def open_vectors(directory: str | Path) -> StoredVectors:
    """Returns the memory-mapped dense vectors of a finished output; ``ValueError`` names a file that is missing or damaged."""
    directory = Path(directory)
    kind = representation(directory)
    if kind != "dense":
        raise ValueError(f"{directory}: holds {kind} representations, dense vectors are needed here; encode with a dense model")
    values_NC = _mapped(directory / VECTORS)
    return StoredVectors(values_NC, _mapped(directory / SCALES) if values_NC.dtype == np.int8 else None)


def representation(directory: str | Path) -> str:
    """Returns what a finished output holds: dense, sparse or tokens."""
    meta = Path(directory) / META
    return read_json(meta).get("representation", "dense") if meta.is_file() else "dense"


def open_encoded(directory: str | Path) -> StoredVectors | csr_matrix | TokenVectors:
    """Returns what a finished output of any kind holds, memory-mapped: a ``csr_matrix`` (N, V) of sparse weights.

    Raises ``ValueError`` naming a file that is missing or damaged, or files that do not fit each other.
    """
    directory, kind = Path(directory), representation(directory)
    if kind == "dense":
        return open_vectors(directory)
    try:
        if kind == "tokens":
            return TokenVectors(_mapped(directory / VECTORS), np.asarray(_mapped(directory / OFFSETS)))
        parts = [_mapped(directory / name) for name in (DATA, INDICES, INDPTR)]
        return csr_matrix(tuple(parts), shape=(len(parts[-1]) - 1, read_json(directory / META)["width"]))
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); encode it anew") from None


def check_whole(arrays: list[StoredArray], out: Path) -> None:
    """Raises ``ValueError`` naming the files of a finished output that are missing or not as long as they must be."""
    sizes = {out / array.name: array.size for array in arrays}
    cut = [path.name for path, size in sizes.items() if not path.exists() or path.stat().st_size != size]
    if cut or not (out / IDS).exists():
        raise ValueError(f"{out}: {', '.join(cut) or IDS} is missing or cut short; pass --restart to encode anew")
