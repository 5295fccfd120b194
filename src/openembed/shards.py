"""Parts of a file of documents that can be read alone: where each begins, and proof that two machines read the same bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from openembed.config import Config
from openembed.documents import parse_documents
from openembed.records import Document


class Shard(Config):
    """The ``number``-th run of ``count`` documents: bytes ``start`` to ``stop``, the first of which is in ``line`` (from 1)."""

    number: int
    start: int
    stop: int
    line: int
    count: int
    sha256: str

    def read(self, path: Path) -> list[Document]:
        """Returns its documents; raises ``ValueError`` when ``path`` does not hold here what it held where it was divided."""
        with path.open("rb") as file:
            file.seek(self.start)
            data = file.read(self.stop - self.start)
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise ValueError(
                f"{path}: bytes {self.start:,} to {self.stop:,} are not what the driver read; share one file, unchanged"
            )
        return [document for _, document in parse_documents(path, self._lines(data))]

    def _lines(self, data: bytes) -> Iterator[tuple[int, str]]:
        for number, line in enumerate(_split(data), self.line):
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")


def divide(path: Path, count: int, wanted: Iterable[int]) -> Iterator[Shard]:
    """Yields the ``wanted`` shards, in order, of ``count`` documents each but the last; ``path`` is not compressed."""
    wanted = set(wanted)
    number = documents = start = position = 0
    line, first, digest = 0, 1, hashlib.sha256()
    with path.open("rb") as file:
        for line, data in enumerate(file, 1):
            digest.update(data)
            position += len(data)
            documents += bool(data.decode("utf-8-sig").strip())
            if documents == count:
                if number in wanted:
                    yield _shard(number, start, position, first, count, digest)
                number, documents, start, first, digest = number + 1, 0, position, line + 1, hashlib.sha256()
    if documents and number in wanted:
        yield _shard(number, start, position, first, documents, digest)


def _shard(number: int, start: int, stop: int, line: int, count: int, digest: hashlib._Hash) -> Shard:
    return Shard(number=number, start=start, stop=stop, line=line, count=count, sha256=digest.hexdigest())


def _split(data: bytes) -> list[bytes]:
    """Lines as a file gives them: divided at line feeds alone."""
    lines = data.split(b"\n")
    return lines if lines[-1] else lines[:-1]
