"""Starts for training: a decoder without pretraining as a bag of words, and a head over the vocabulary that ReLU leaves alive.

A decoder's token embeddings are taken from a teacher.

The static part is that of Model2Vec (Tulkens and van Dongen, 2024): the teacher encodes every token of the vocabulary
alone, frequent tokens are weighted down by ``a / (a + p)`` (smooth inverse frequency, Arora et al., 2017). One coordinate
of every row is reserved: it fills each row to the same length, so that the normalisation inside a decoder, which would
undo the weights, leaves them as they are. Shapes: V vocabulary, D hidden width, E teacher width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from openembed.backbones.text import inference
from openembed.data.teacher import TeacherVectors
from openembed.encoder import Encoder
from openembed.heads.splade import Splade
from openembed.packing import pack
from openembed.records import Example
from openembed.tokenization import TextTokenizer

logger = logging.getLogger(__name__)

CALIBRATED = 64
"""Documents whose weights set an offset."""

CONTENT = 0.9
"""Share of a row's squared length that a token of weight 1 gives to its content; the rest is the reserved coordinate."""


def token_weights(tokenizer: TextTokenizer, texts: Iterable[str], smoothing: float) -> np.ndarray:
    """Returns ``smoothing / (smoothing + p)`` of every token id (V,), p its share of all tokens of ``texts``."""
    counts_V = np.zeros(tokenizer.vocabulary)
    total = 0
    for encoding in tokenizer.backend.encode_batch_fast(list(texts)):
        np.add.at(counts_V, encoding.ids, 1)
        total += len(encoding.ids)
    return smoothing / (smoothing + counts_V / max(1, total))


def token_vectors(tokenizer: TextTokenizer, teacher: Encoder, directions_EK: np.ndarray) -> np.ndarray:
    """Returns the teacher's vector of each token's text on the given directions (V, K); special tokens get zeros.

    A piece that continues a word stands for the same letters alone.
    """
    backend = tokenizer.backend
    special = {number for number, token in backend.get_added_tokens_decoder().items() if token.special}
    texts = [backend.decode([number], skip_special_tokens=False).removeprefix("##") for number in range(tokenizer.vocabulary)]
    vectors_VE = teacher.encode_documents(texts, progress=True)
    vectors_VE[sorted(special)] = 0
    return vectors_VE @ directions_EK


@torch.no_grad()
def initialise(encoder: Encoder, vectors: TeacherVectors, teacher: Encoder, texts: Iterable[str], smoothing: float) -> None:
    """Puts the teacher's tokens into the encoder's embedding table and makes its last projection pass them on.

    Directions come from ``vectors``, as in distillation, so the start already lies in the space that is aimed at. Raises
    ``ValueError`` when the teacher is narrower than the student's width less one, or the last projection is not square.
    """
    width = encoder.backbone.width
    directions_EK = vectors.principal_directions(width)[:, : width - 1]
    weights_V1 = token_weights(encoder.tokenizer, texts, smoothing)[:, None]
    content_VK = token_vectors(encoder.tokenizer, teacher, directions_EK) * weights_V1 * np.sqrt(CONTENT * width)
    rest_V = np.sqrt(np.maximum(width - np.square(content_VK).sum(1), 0))
    table_VD = torch.from_numpy(np.concatenate([content_VK, rest_V[:, None]], axis=1)).float()
    encoder.backbone.model.get_input_embeddings().weight[: len(table_VD)] = table_VD
    if encoder.projections:
        linear = encoder.projections[-1].linear
        if linear.weight.shape != (width, width):
            raise ValueError(
                f"the last projection maps {tuple(linear.weight.shape)[::-1]}; initialising needs width {width} kept"
            )
        linear.weight.copy_(torch.eye(width))
        linear.weight[-1, -1] = 0
        if linear.bias is not None:
            linear.bias.zero_()


@torch.no_grad()
def calibrate(encoder: Encoder, rows: Mapping[str, Sequence[Example]], share: float, max_length: int | None = None) -> None:
    """Sets the offset of a head over the vocabulary so that ``share`` of the weights of some positives are above 0.

    The positives are the first of every source, as many of each. Raises ``ValueError`` for a head without an offset.
    """
    if not isinstance(encoder.head, Splade):
        raise ValueError(f"calibrate: only a head over the vocabulary has an offset; this model's kind is {encoder.kind}")
    each = -(-CALIBRATED // len(rows))
    texts = [example.positives[0].full_text for source in rows.values() for example in source[:each]]
    with inference(encoder):
        packed = pack(encoder.tokenize(texts, encoder.document_prompt(), max_length), device=encoder.device)
        offset = encoder.head.calibrate(encoder.backbone(packed), packed, share)
    logger.info("offset %.4g: %.3g of the weights of %d documents are above 0", offset, share, len(texts))
