"""Where the rows of a source come from: JSON lines, Parquet, a folder of them, a BEIR folder, or the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from openembed.config import Config
from openembed.data.readers import read_beir
from openembed.files import read_jsonl
from openembed.records import Document, Qrels, Query

ROW_FILES = (".jsonl", ".jsonl.gz", ".parquet")
"""What a folder of rows may hold, read in the order of the files' names."""


class HubConfig(Config):
    """A data set of the Hugging Face hub; ``revision`` is the commit it is pinned to.

    ``layout``: ``rows``, or ``beir`` (configs ``corpus``, ``queries`` and the judgements, as mteb publishes retrieval
    sets). ``file`` reads one file of the repository, for sets whose loading script newer libraries refuse.
    """

    id: str
    config: str | None = None
    split: str = "train"
    revision: str | None = Field(default=None, pattern="^[0-9a-f]{40}$")
    layout: Literal["rows", "beir"] = "rows"
    file: str | None = None


Rows = Sequence[tuple[str, Mapping[str, Any]]]
"""(where, row) pairs, ``where`` naming file and line for errors."""


def is_beir(path: Path) -> bool:
    """Whether ``path`` is a folder in the BEIR layout."""
    return any((path / f"corpus.jsonl{end}").is_file() for end in ("", ".gz"))


def read_rows(path: Path) -> Rows:
    """Returns the rows of a JSON-lines or Parquet file, or of all such files of a folder.

    Raises ``ValueError`` for a path that is not there, a folder without such files, and a damaged file.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name.endswith(ROW_FILES))
        if not files:
            raise ValueError(f"{path}: holds neither a BEIR corpus nor files that end in {', '.join(ROW_FILES)}")
        return [row for file in files for row in _read_file(file)]
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    return list(_read_file(path))


def _read_file(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    rows: Iterable[tuple[int, Mapping[str, Any]]]
    rows = enumerate(_parquet(path), 1) if path.suffix == ".parquet" else read_jsonl(path)
    for number, row in rows:
        yield f"{path}:{number}", row


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{path}: reading Parquet needs pyarrow: pip install 'openembed[eval]'") from None
    try:
        return parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet ({error}); the file is damaged or something else") from None


class HubRows(Sequence[tuple[str, Mapping[str, Any]]]):
    """The rows of a hub data set, read from its memory-mapped tables when asked for."""

    def __init__(self, hub: HubConfig) -> None:
        self.dataset, self.origin = _load(hub, hub.config, hub.split), hub.id

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return f"{self.origin}:{index + 1}", self.dataset[index]

    def __iter__(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for number, row in enumerate(self.dataset, 1):
            yield f"{self.origin}:{number}", row


class HubCorpus(Sequence[Document]):
    """The documents of a hub set in BEIR layout, made when asked for: millions of them would not fit in memory at once."""

    def __init__(self, hub: HubConfig) -> None:
        self.dataset = _load(hub, "corpus", "corpus")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return self._document(self.dataset[index])

    def __iter__(self) -> Iterator[Document]:
        return map(self._document, self.dataset)

    @staticmethod
    def _document(row: Mapping[str, Any]) -> Document:
        return Document(str(row["_id"]), row["text"], row.get("title") or "")


def _load(hub: HubConfig, config: str | None, split: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError("hub data sets need the datasets package: pip install 'openembed[eval]'") from None
    try:
        if hub.file is not None:
            kind = "parquet" if hub.file.endswith(".parquet") else "json"
            url = f"hf://datasets/{hub.id}@{hub.revision or 'main'}/{hub.file}"
            return load_dataset(kind, data_files=url, split="train")
        return load_dataset(hub.id, config, split=split, revision=hub.revision)
    except Exception as error:  # the hub client raises many unrelated types
        raise ValueError(
            f"hub data set {hub.id!r} cannot be loaded ({type(error).__name__}: {error}). "
            "Check the id and the network, or give path to a local copy."
        ) from None


class Judged:
    """Queries with their relevant documents, and all documents, from a BEIR folder or a hub set of that layout."""

    def __init__(self, queries: Sequence[Query], qrels: Qrels, corpus: Sequence[Document]) -> None:
        self.queries, self.qrels, self.corpus = queries, qrels, corpus

    def pairs(self) -> Iterator[tuple[Query, tuple[Document, ...]]]:
        """Yields each judged query with all its relevant documents; one without any is left out."""
        wanted = {identifier for judged in self.qrels.values() for identifier, grade in judged.items() if grade > 0}
        documents = {document.id: document for document in self.corpus if document.id in wanted}
        for query in self.queries:
            judged = self.qrels.get(query.id, {})
            relevant = tuple(documents[i] for i, grade in judged.items() if grade > 0 and i in documents)
            if relevant:
                yield query, relevant


def read_judged(path: Path | None, split: str, hub: HubConfig | None) -> Judged:
    """Returns the judged queries of a BEIR folder or hub data set; raises ``ValueError`` when it cannot be read."""
    if path is not None:
        try:
            corpus, queries, qrels = read_beir(path, split)
        except FileNotFoundError as error:
            raise ValueError(str(error)) from None
        return Judged(queries, qrels, corpus)
    assert hub is not None
    qrels = {}
    for row in _load(hub, hub.config, hub.split):
        qrels.setdefault(str(row["query-id"]), {})[str(row["corpus-id"])] = int(row["score"])
    found = [Query(str(row["_id"]), row["text"]) for row in _load(hub, "queries", "queries")]
    return Judged(found, qrels, HubCorpus(hub))
