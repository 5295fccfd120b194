"""Token ids of texts by way of their words, each tokenized once: several times faster than the tokenizer itself.

That is exact where spaces always separate tokens and no token depends on its neighbours: BERT's normalisation and splitting
before WordPiece, without tokens added to the vocabulary. Other tokenizers have none of this.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain

from tokenizers import Tokenizer

REMEMBERED = 2**22
"""Characters of the words that are remembered, some 500,000 of them; beyond that all are forgotten at once."""


class Words:
    """Remembers the token ids of words between spaces."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self._ids: dict[str, list[int]] = {}
        self._characters = 0

    def __call__(self, texts: Sequence[str]) -> tuple[list[int], list[int]]:
        """Returns the token ids of all texts end to end and where each text's end; nothing is put around them."""
        try:
            return self._joined(texts, self._ids)
        except KeyError:
            return self._joined(texts, self._learned({word for text in texts for word in text.split(" ")}))

    @staticmethod
    def _joined(texts: Sequence[str], known: dict[str, list[int]]) -> tuple[list[int], list[int]]:
        find, flatten = known.__getitem__, chain.from_iterable
        ids: list[int] = []
        ends = []
        for text in texts:  # one list for all: many small ones would set the garbage collector off
            ids += flatten(map(find, text.split(" ")))
            ends.append(len(ids))
        return ids, ends

    def _learned(self, words: set[str]) -> dict[str, list[int]]:
        """Returns what is remembered, these words among it; other threads may have forgotten all meanwhile."""
        if self._characters > REMEMBERED:
            self._ids, self._characters = {}, 0
        known = self._ids
        new = [word for word in words if word not in known]
        encodings = self._backend.encode_batch_fast(new, add_special_tokens=False)
        known.update((word, encoding.ids) for word, encoding in zip(new, encodings, strict=True))
        self._characters += sum(map(len, new))
        return known


def words_of(backend: Tokenizer) -> Words | None:
    """Returns what tokenizes by words exactly as ``backend`` does, None where that cannot be said."""
    settings = json.loads(backend.to_str())
    kinds = [(settings[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")]
    plain = all(token["special"] for token in settings["added_tokens"]) and backend.encode_special_tokens
    return Words(backend) if plain and kinds == ["BertNormalizer", "BertPreTokenizer", "WordPiece"] else None
