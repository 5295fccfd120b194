"""Weights over the vocabulary from the logits of a language model's head: SPLADE and its relatives, VDR among them.

    w_v = max (or sum) over the pooled tokens i of f( T(h_i) · E_v + b_v + offset )

SPLADE v2 (arXiv 2109.10086): T the masked language model's transform, E its tied input embeddings, f = log(1 + relu). VDR
(arXiv 2212.07699): T a LayerNorm, no bias, f = elu + 1, the largest weights and the text's own tokens kept. Deviations from
their released code: padding and instructions cannot be pooled, and entries that stand for no text (special, unused) have
weight 0 in training too.

Shapes: ``T`` tokens, ``B`` texts, ``D`` width, ``V`` vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from openembed.config import Config
from openembed.heads.vocabulary import bags, excluded_tokens, folded, folded_tokens, own_tokens
from openembed.heads.vocabulary_pooling import Activation, max_pooled, packed_for, sum_pooled, working_bytes
from openembed.packing import Packed, TokenRows
from openembed.versions import version

if TYPE_CHECKING:
    from openembed.backbones.text import TextBackbone
    from openembed.tokenization import TextTokenizer

TRANSFORM_ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu, "silu": F.silu}

Gate = Literal["parametric", "lexical", "bag_of_words"]
"""What of a text counts when it is encoded: all weights, those of its own tokens, or its own tokens with weight 1."""


class SideConfig(Config):
    """What is left of a side's weights when it is encoded; training sees them all.

    ``gate``: see :data:`Gate`; ``bag_of_words`` runs no model. ``top_k``: the largest weights, and with ``keep_own`` the
    text's own tokens. ``prune_ratio``: weights above this share of the text's largest.
    """

    gate: Gate = "parametric"
    top_k: int | None = Field(None, gt=0)
    keep_own: bool = False
    prune_ratio: float = Field(0.0, ge=0, lt=1)


class SpladeConfig(Config):
    """Pooled logits over the vocabulary.

    ``transform`` of states before the product: ``mlm`` (dense, activation, LayerNorm), ``norm`` (LayerNorm; VDR) or none.
    ``tied``: products with the backbone's input embeddings, else with a matrix of the head's own (it starts as their copy).
    ``bias``: one a vocabulary entry. ``offset``: start of one more learned bias for all of them, for decoders, whose logits
    may all be negative at first and give ReLU no gradient (:meth:`Splade.calibrate` finds one); None: none.
    ``exclude_special``: entries that stand for no text have weight 0. ``fold``: entries that differ in case or in the mark
    before a word alone count as one (:func:`openembed.heads.vocabulary.folded_tokens`), for decoders, whose vocabularies have
    "Sun", " Sun", "sun" and " sun": their largest weight. ``bags``: training is told each text's own tokens.
    """

    kind: Literal["splade"] = "splade"
    pooling: Literal["max", "sum"] = "max"
    activation: Activation = "log1p_relu"
    transform: Literal["none", "norm", "mlm"] = "none"
    transform_activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "gelu"
    dense_bias: bool = True
    norm_bias: bool = True
    norm_epsilon: float = Field(1e-12, gt=0)
    tied: bool = True
    bias: bool = True
    offset: float | None = None
    exclude_special: bool = True
    fold: bool = Field(False, exclude_if=lambda given: not given)  # models were trained before it was there
    bags: bool = False
    query: SideConfig = SideConfig()
    document: SideConfig = SideConfig()

    @model_validator(mode="after")
    def _one_gate(self) -> SpladeConfig:
        for name in ("query", "document"):
            side = getattr(self, name)
            if side.gate != "parametric" and (side.top_k is not None or side.keep_own):
                raise ValueError(f"{name}: gate {side.gate!r} keeps the text's own tokens alone; leave top_k and keep_own out")
            if side.keep_own and side.top_k is None:
                raise ValueError(f"{name}: keep_own keeps tokens that top_k would drop; give top_k")
        return self

    @property
    def keeps_all(self) -> bool:
        """Whether a document has a weight above 0 for every entry that counts."""
        side = self.document
        return self.activation == "elu1p" and side.gate == "parametric" and side.top_k is None and not side.prune_ratio

    def build(self, width: int) -> Splade:
        """Returns the head for hidden states of ``width``; it is whole after :meth:`Splade.attach`."""
        return Splade(self, width)


class Splade(nn.Module):
    """Weights over the vocabulary, ``(B, V)`` float32, at least 0."""

    kind = "sparse"

    def __init__(self, config: SpladeConfig, width: int) -> None:
        super().__init__()
        self.config, self._hidden, self.width = config, width, 0
        self.dense = self.norm = self.matrix_VD = self.bias_V = self.offset = None
        self._backbone: tuple[TextBackbone, ...] = ()
        self._packed: tuple[object, Tensor | None] | None = None
        self.register_buffer("excluded_V", None, persistent=False)
        self.register_buffer("fold_V", None, persistent=False)

    @property
    def sided(self) -> bool:
        """True where the two sides keep different parts of their weights."""
        return self.config.query != self.config.document

    def attach(self, backbone: TextBackbone, tokenizer: TextTokenizer) -> None:
        """Makes the parameters, for this backbone's vocabulary, and looks up which entries count."""
        self._backbone = (backbone,)  # in a tuple, so that it does not become a child and its weights ours
        table_VD = backbone.model.get_input_embeddings().weight
        self.width, width = table_VD.shape
        config = self.config
        if config.transform == "mlm":
            self.dense = nn.Linear(self._hidden, width, bias=config.dense_bias)
        elif width != self._hidden:
            raise ValueError(
                f"the embeddings are {width} wide and the states {self._hidden}; use transform = 'mlm', which maps between them"
            )
        if config.transform != "none":
            self.norm = nn.LayerNorm(width, eps=config.norm_epsilon, bias=config.norm_bias)
        if not config.tied:
            self.matrix_VD = nn.Parameter(table_VD.detach().float().clone())
        if config.bias:
            self.bias_V = nn.Parameter(torch.zeros(self.width))
        if config.offset is not None:
            self.offset = nn.Parameter(torch.tensor(float(config.offset)))
        none = torch.zeros(self.width, dtype=torch.bool)
        self.excluded_V = excluded_tokens(tokenizer, self.width) if config.exclude_special else none
        self.fold_V = folded_tokens(tokenizer, self.excluded_V) if config.fold else None

    @property
    def output_VD(self) -> Tensor:
        """The output matrix: the backbone's embeddings where they are tied."""
        return self._backbone[0].model.get_input_embeddings().weight if self.matrix_VD is None else self.matrix_VD

    def side(self, packed: Packed) -> SideConfig:
        """Returns what is kept of these texts."""
        return self.config.query if packed.query else self.config.document

    def reads_states(self, packed: Packed) -> bool:
        """Returns whether hidden states matter for these texts; where not, ``forward`` takes None for them."""
        return self.training or self.side(packed).gate != "bag_of_words"

    def forward(self, hidden_TD: Tensor | None, packed: Packed) -> Tensor:
        """Returns ``(B, V)`` float32; in training all weights, else what :class:`SideConfig` leaves of them."""
        if hidden_TD is None:
            return own_tokens(packed, self.excluded_V, self.fold_V).float()
        states_TD, lengths_B = self._pooled_states(hidden_TD, packed)
        inputs = states_TD, self.output_VD, self.biases(), lengths_B, self.config.activation
        if self.config.pooling == "max":  # a model in int8 multiplies by its vocabulary in bfloat16, as its attention does
            half = self._backbone[0].precision == "int8" and not self.training
            values_BV = max_pooled(*inputs, half=half, packed=self._packed_matrix(half))
        else:
            values_BV = sum_pooled(*inputs)
        values_BV = folded(values_BV, self.fold_V)
        return values_BV if self.training else self._kept(values_BV, packed)

    def _packed_matrix(self, half: bool) -> Tensor | None:
        """The output matrix as the kernels read it, kept until it changes; None in training, where it does at every step."""
        matrix_VD = self.output_VD
        if self.training or torch.is_grad_enabled():
            self._packed = None  # training changes it at every step
            return None
        if matrix_VD.is_inference() or torch.is_autocast_enabled(matrix_VD.device.type):
            return None
        state = version(matrix_VD), half
        if self._packed is None or self._packed[0] != state:
            self._packed = state, packed_for(matrix_VD, half=half)
        return self._packed[1]

    def bag(self, rows: TokenRows, device: torch.device) -> Tensor | None:
        """Returns each text's own tokens, bool ``(N, V)``, where ``bags`` asks for them."""
        if not self.config.bags:
            return None
        return bags(rows, self.excluded_V.to(device), None if self.fold_V is None else self.fold_V.to(device))

    def working_bytes(self, tokens: int, autocast: torch.dtype | None) -> int:
        """Returns the most that training a micro-batch of so many tokens holds here for a moment, beside what it keeps."""
        matrix_VD = self.output_VD
        return working_bytes(self.config.pooling, tokens, matrix_VD, autocast or matrix_VD.dtype)

    @torch.no_grad()
    def calibrate(self, hidden_TD: Tensor, packed: Packed, share: float = 0.03) -> float:
        """Sets the offset so that ``share`` of these texts' weights over the vocabulary are above 0, and returns it."""
        if self.offset is None:
            raise ValueError("this head has no offset to calibrate; give offset = 0.0 in its settings")
        states_TD, lengths_B = self._pooled_states(hidden_TD, packed)
        self.offset.zero_()
        raw_BV = max_pooled(states_TD, self.output_VD, self.biases(), lengths_B, "elu1p")  # monotone, and loses no sign
        counted = raw_BV[:, ~self.excluded_V].flatten()
        edge = counted.kthvalue(max(1, round(len(counted) * (1 - share)))).values
        self.offset.fill_(1 - edge if edge > 1 else -edge.clamp_min(1e-30).log())
        return float(self.offset)

    def _pooled_states(self, hidden_TD: Tensor, packed: Packed) -> tuple[Tensor, list[int]]:
        """The pooled tokens' states, transformed, and how many each text has."""
        lengths_B = np.maximum(packed.rows.lengths - packed.rows.pool_starts, 0).tolist()
        states_TD = hidden_TD if sum(lengths_B) == len(hidden_TD) else hidden_TD[packed.pool_mask_T]
        if self.dense is not None:
            states_TD = self.dense(states_TD.to(self.dense.weight.dtype))
            states_TD = TRANSFORM_ACTIVATIONS[self.config.transform_activation](states_TD)
        if self.norm is not None:
            states_TD = self.norm(states_TD.to(self.norm.weight.dtype))
        return states_TD, lengths_B

    def biases(self) -> Tensor:
        """Returns the sum of all biases, minus infinity for what must not count, ``(V,)`` float32."""
        bias_V = self.excluded_V.new_zeros(self.width, dtype=torch.float32) if self.bias_V is None else self.bias_V.float()
        bias_V = bias_V if self.offset is None else bias_V + self.offset.float()
        return bias_V.masked_fill(self.excluded_V, float("-inf"))

    def _kept(self, values_BV: Tensor, packed: Packed) -> Tensor:
        side = self.side(packed)
        if side.gate == "lexical":
            values_BV = values_BV * own_tokens(packed, self.excluded_V, self.fold_V)
        if side.top_k is not None:
            own_BV = own_tokens(packed, self.excluded_V, self.fold_V) if side.keep_own else None
            values_BV = values_BV * largest(values_BV, side.top_k, own_BV)
        if side.prune_ratio > 0:
            values_BV = values_BV * (values_BV > side.prune_ratio * values_BV.amax(1, keepdim=True))
        return values_BV


def largest(values_BV: Tensor, top_k: int, also_BV: Tensor | None = None) -> Tensor:
    """Returns where the ``top_k`` largest weights of each text are, or ``also_BV``: bool ``(B, V)``."""
    mask_BV = torch.zeros_like(values_BV, dtype=torch.bool)
    mask_BV.scatter_(1, values_BV.topk(min(top_k, values_BV.shape[1]), dim=1).indices, True)
    return mask_BV if also_BV is None else mask_BV | also_BV
