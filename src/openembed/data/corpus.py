"""The documents that are mined, on disk: read one by one by number, with what tells them apart in small arrays.

N documents.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from openembed.data.batch import text_key
from openembed.files import atomic_write
from openembed.records import Document, Example

DOCUMENTS, NUMBERS = "documents.jsonl", "documents.npz"


class Corpus:
    """Documents by number, from a file; only those asked for are read. 44 bytes a document are held in memory.

    ``text_N`` and ``id_N``: int64 hashes of the text (blind to case and white space) and of the id (0 for none);
    ``bare_N``: of the text without its title, or of the title where there is no text;
    ``words_N``: how many distinct words a text has. ``digest``: SHA-256 of the file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / DOCUMENTS
        with np.load(Path(folder) / NUMBERS) as numbers:
            self._starts, self._identity_N = numbers["starts"], numbers["identity"]
            self.text_N, self.id_N, self.words_N = numbers["text"], numbers["id"], numbers["words"]
            self.bare_N = numbers.get("bare", self.text_N)  # a pool kept by an older version has none
            self.digest = str(numbers["digest"])
        self._order_N = np.argsort(self._identity_N, kind="stable")
        self._file = self.path.open("rb")

    def __len__(self) -> int:
        return len(self.text_N)

    def __getitem__(self, number: int) -> Document:
        self._file.seek(int(self._starts[number]))
        row = json.loads(self._file.read(int(self._starts[number + 1] - self._starts[number])))
        return Document(row["id"], row["text"], row.get("title", ""))

    def __iter__(self) -> Iterator[Document]:
        return (self[number] for number in range(len(self)))

    def find(self, document: Document) -> int:
        """Returns the number of the first document of this id and text; ``KeyError`` when there is none."""
        place = np.searchsorted(self._identity_N, identity(document), sorter=self._order_N)
        if place == len(self) or self._identity_N[self._order_N[place]] != identity(document):
            raise KeyError(document.id)
        return int(self._order_N[place])


def write_corpus(folder: str | Path, documents: Iterable[Document], examples: Sequence[Example]) -> Corpus:
    """Returns the corpus of ``documents``, streamed to ``folder``; below them the positives it lacks.

    So every positive gets a score, and an empty corpus becomes that of all positives. The file's ``_id`` is the number.
    """
    starts, identities, texts = array("q", [0]), array("q"), array("q")
    bare, ids, words, digest = array("q"), array("q"), array("i"), hashlib.sha256()
    with atomic_write(Path(folder) / DOCUMENTS, "wb") as file:

        def add(document: Document) -> None:
            row = {"_id": str(len(texts)), "id": document.id, "text": document.text}
            row |= {"title": document.title} if document.title else {}
            line = (json.dumps(row) + "\n").encode()
            file.write(line)
            digest.update(line)
            starts.append(starts[-1] + len(line))
            identities.append(identity(document))
            texts.append(text_key(document.full_text))
            bare.append(text_key(document.text if document.text.strip() else document.full_text))
            ids.append(id_hash(document.id))
            words.append(len(word_set(document.full_text)))

        for document in documents:
            add(document)
        known = set(identities)
        for example in examples:
            for document in example.positives:
                if identity(document) not in known:
                    known.add(identity(document))
                    add(document)
    numbers = {"starts": starts, "identity": identities, "text": texts, "bare": bare, "id": ids}
    arrays = {name: np.array(values, dtype=np.int64) for name, values in numbers.items()}
    with atomic_write(Path(folder) / NUMBERS, "wb") as file:
        np.savez(file, words=np.array(words, dtype=np.int32), digest=np.array(digest.hexdigest()), **arrays)
    return Corpus(folder)


def identity(document: Document) -> int:
    """Returns a 64-bit hash of id and exact text."""
    return _hash(f"{document.id}\0{document.full_text}")


def id_hash(identifier: str) -> int:
    """Returns a 64-bit hash of an id, 0 for the empty one, which names nothing."""
    return _hash(identifier) if identifier else 0


def word_set(text: str) -> frozenset[str]:
    """Returns the distinct words of a text, blind to case."""
    return frozenset(text.casefold().split())


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
