"""What a head over the vocabulary needs to know of it: which entries are no words, and which are a text's own.

Shapes: ``B`` texts, ``V`` vocabulary.
"""

from __future__ import annotations

import re
import unicodedata

import torch
from torch import Tensor

from openembed.packing import Packed, TokenRows, pack
from openembed.tokenization import TextTokenizer

PLACEHOLDER = re.compile(r"\W*(unused|reserved|extra_id|extra_token|madeupword|dummy)[\w ]*\W*", re.IGNORECASE)
"""Names that vocabularies give to entries left for later use: ``[unused12]``, ``<|reserved_special_token_3|>``."""


def excluded_tokens(tokenizer: TextTokenizer, vocabulary: int) -> Tensor:
    """Returns the entries that stand for no text, bool ``(V,)``: special, left unused, without a visible character, or
    rows of the embedding table past the tokenizer's last token."""
    excluded_V = torch.ones(vocabulary, dtype=torch.bool)
    special = {number for number, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    for name, number in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        if number < vocabulary:
            text = tokenizer.backend.decode([number], skip_special_tokens=False)
            named = PLACEHOLDER.fullmatch(name) is not None and not name.isalpha()
            excluded_V[number] = number in special or named or not _visible(text)
    return excluded_V


def _visible(text: str) -> bool:
    return any(unicodedata.category(character)[0] not in "CZ" for character in text)


def own_tokens(packed: Packed, excluded_V: Tensor) -> Tensor:
    """Returns which entries are among each text's pooled tokens, bool ``(B, V)``; excluded ones never are."""
    texts_T = torch.repeat_interleave(
        torch.arange(len(packed), device=packed.ids_T.device), packed.lengths_B, output_size=len(packed.ids_T)
    )
    kept_T = packed.pool_mask_T & ~excluded_V[packed.ids_T]
    bag_BV = torch.zeros(len(packed), len(excluded_V), dtype=torch.bool, device=packed.ids_T.device)
    bag_BV[texts_T[kept_T], packed.ids_T[kept_T]] = True
    return bag_BV


def bags(rows: TokenRows, excluded_V: Tensor) -> Tensor:
    """Returns :func:`own_tokens` of all ``rows``, of either side, on the device of ``excluded_V``."""
    return own_tokens(pack(TokenRows(rows.ids, rows.pool_starts), device=excluded_V.device), excluded_V)
