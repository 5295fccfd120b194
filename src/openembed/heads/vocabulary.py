"""What a head over the vocabulary needs to know of it: entries that are no words, that spell the same, that a text has.

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


def folded_tokens(tokenizer: TextTokenizer, excluded_V: Tensor) -> Tensor:
    """Returns the entry that each entry counts as, int64 ``(V,)``: the first of all that spell the same.

    Case, compatibility forms (NFKC) and the mark or space before a word do not tell spellings apart. Excluded entries and
    bytes that are a part of a character count as themselves.
    """
    first: dict[str, int] = {}
    fold_V = torch.arange(len(excluded_V))
    for number in torch.nonzero(~excluded_V).flatten().tolist():
        text = tokenizer.backend.decode([number], skip_special_tokens=False)
        if "\ufffd" not in text:
            fold_V[number] = first.setdefault(unicodedata.normalize("NFKC", text).casefold().strip(), number)
    return fold_V


def folded(values_BV: Tensor, fold_V: Tensor | None) -> Tensor:
    """Returns weights of at least 0 with each entry's largest where it counts, and 0 elsewhere; as they are for None."""
    if fold_V is None:
        return values_BV
    return torch.zeros_like(values_BV).scatter_reduce(1, fold_V.expand_as(values_BV), values_BV, "amax")


def _visible(text: str) -> bool:
    return any(unicodedata.category(character)[0] not in "CZ" for character in text)


def own_tokens(packed: Packed, excluded_V: Tensor, fold_V: Tensor | None = None) -> Tensor:
    """Returns which entries are among each text's pooled tokens, bool ``(B, V)``; excluded ones never are.

    ``fold_V``: what each token counts as (:func:`folded_tokens`).
    """
    texts_T = torch.repeat_interleave(
        torch.arange(len(packed), device=packed.ids_T.device), packed.lengths_B, output_size=len(packed.ids_T)
    )
    kept_T = packed.pool_mask_T & ~excluded_V[packed.ids_T]
    bag_BV = torch.zeros(len(packed), len(excluded_V), dtype=torch.bool, device=packed.ids_T.device)
    ids_T = packed.ids_T[kept_T]
    bag_BV[texts_T[kept_T], ids_T if fold_V is None else fold_V[ids_T]] = True
    return bag_BV


def bags(rows: TokenRows, excluded_V: Tensor, fold_V: Tensor | None = None) -> Tensor:
    """Returns :func:`own_tokens` of all ``rows``, of either side, on the device of ``excluded_V``."""
    return own_tokens(pack(TokenRows(rows.ids, rows.pool_starts), device=excluded_V.device), excluded_V, fold_V)
