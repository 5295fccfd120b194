"""The encoder: texts in, vectors out. Tokenizer, backbone, head and prompts belong together here.

Shapes: ``N`` texts, ``B`` texts of a micro-batch, ``D`` width of the representation.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TypedDict, Unpack

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from openembed.backbones.text import BackboneConfig, TextBackbone, inference
from openembed.config import Config, chosen, parse
from openembed.encoded import CALLED, Encoded, Gathered, GatheredDense, gathered
from openembed.heads import HeadConfig
from openembed.heads.idf_lookup import IdfLookup, IdfLookupConfig
from openembed.heads.projection import ProjectionConfig
from openembed.heads.splade import SideConfig, SpladeConfig
from openembed.heads.token_pooling import TokenPoolConfig
from openembed.heads.token_projection import TokenProjectionConfig
from openembed.layouts import SPARSE_LAYOUTS, check_layout
from openembed.packing import Packed, TokenRows, pack
from openembed.progress import progress as progress_bar
from openembed.representations import Dense, Kind, Representation, Sparse, Tokens
from openembed.tokenization import TextTokenizer, TokenizerConfig
from openembed.vectors import Precision, VectorFormat, truncation_warning
from openembed.versions import version

logger = logging.getLogger(__name__)
CPU_TOKEN_BUDGET = 1536
"""Tokens a micro-batch on a CPU: large enough for full-speed matrix products, small enough to stay in its caches."""

GPU_TOKEN_BUDGET = 65536

WEIGHTS_AT_ONCE = 2**26
"""Weights over the vocabulary of a micro-batch, 256 MB: many short texts are few tokens and yet many rows so wide."""

ORIGIN = ("path", "revision", "architecture")
"""Settings that say where a backbone came from, not what it computes."""

FINGERPRINT_TEXTS = ("The quick Brown fox, 2024: naïve café?", " two  spaces\tand\nlines", "ΑΒΓ ёж 中文 かな 한국어 🙂 ﬁ", "")
"""Texts whose token ids tell tokenizers apart."""


class TaskInstruction(Config):
    """What a task asks of its queries and, for symmetric tasks, of its documents; rendered through the template."""

    query: str
    document: str = ""


class PromptConfig(Config):
    """What is put before texts. ``query`` and ``document`` are literal prefixes used when nothing else is asked for.

    ``template`` renders an instruction (``{task}``); the paper's is ``"Instruct: {task}\\nQuery: "``. The default here
    ends in a line break instead of a space: tokenizers rarely merge across it, so the instruction's tokens are the same
    alone and before a text, and other libraries find the same span (saving checks that). ``tasks`` names
    instructions; ``named`` names
    literal prefixes (sentence-transformers' prompts).
    """

    template: str = "Instruct: {task}\nQuery:\n"
    query: str = ""
    document: str = ""
    tasks: dict[str, TaskInstruction] = Field(default_factory=dict)
    named: dict[str, str] = Field(default_factory=dict)

    def render(self, instruction: str) -> str:
        """Returns the literal prefix of an instruction; one that is already rendered is taken as it is."""
        if not instruction:
            return ""
        before, _, after = self.template.partition("{task}")
        rendered = re.fullmatch(re.escape(before.rstrip()) + r"\s.*" + re.escape(after.rstrip()) + r"\s*", instruction, re.S)
        return instruction if before.strip() and rendered else before + instruction + after


class EncoderConfig(Config):
    """Everything that defines an encoder but its weights.

    ``tokenizer_path``: folder or hub id of the tokenizer, where it is not the backbone's. ``max_length``: tokens a text
    may have, instruction and special tokens included. ``query_head``: looks queries up, so that these run no model.
    ``matryoshka``: the numbers of dimensions that its last training trained; a note for those who truncate, which changes no
    vector.
    """

    backbone: BackboneConfig
    head: HeadConfig
    query_head: IdfLookupConfig | None = None
    projections: tuple[ProjectionConfig, ...] = ()
    tokenizer: TokenizerConfig = TokenizerConfig()
    tokenizer_path: str | None = None
    prompts: PromptConfig = PromptConfig()
    max_length: int = Field(512, gt=0)
    matryoshka: tuple[int, ...] = ()


class EncodeOptions(TypedDict, total=False):
    """The options of :meth:`Encoder.encode` and of its query and document forms."""

    max_length: int | None
    normalize: bool
    token_budget: int | None
    progress: bool
    dimensions: int | None
    precision: Precision


class Encoder(nn.Module):
    """Turns texts into what its head makes (:attr:`kind`): dense vectors, weights over the vocabulary, or token vectors.

    ``encode_queries`` and ``encode_documents`` are what retrieval needs; ``encode`` is the plain form. End tokens,
    truncation, the pooled span, batching and normalisation are the model's business, not the caller's.
    """

    def __init__(self, config: EncoderConfig, tokenizer: TextTokenizer, backbone: TextBackbone, head: nn.Module) -> None:
        super().__init__()
        self.config, self.tokenizer, self.backbone, self.head = config, tokenizer, backbone, head
        if hasattr(head, "attach"):
            head.attach(backbone, tokenizer)
        self.query_head = self._built_query_head()
        if self.kind == "tokens" and config.projections:
            raise ValueError("projections come after one vector a text; a layer under a token head is one of its 'before'")
        widths = [head.width, *(p.width for p in config.projections)]
        self.projections = nn.ModuleList(p.build(w) for p, w in zip(config.projections, widths, strict=False))
        self.width: int = widths[-1]
        self._fingerprint: tuple[object, str] | None = None
        self._warned = False

    @cached_property
    def _look_up(self) -> Callable[[list[int], list[int]], Encoded] | None:
        """What makes rows of queries' own tokens alone; None where rows are of more, or queries are no lookup."""
        settings = self.config.tokenizer
        known = self.tokenizer.vocabulary <= self.backbone.vocabulary
        alone = known and settings.repeat is None and settings.expansion is None
        return self.query_head.look_up if alone and self.query_head is not None else None

    @cached_property
    def _positions(self) -> int | None:
        return self.backbone.max_positions  # asked for at every query; a module's parts are slow to look up

    def _built_query_head(self) -> IdfLookup | None:
        if self.config.query_head is None:
            return None
        if self.kind != "sparse" or self.config.projections:
            raise ValueError("query_head looks queries up in the vocabulary; give a sparse head, and no projections")
        if self.config.query_head.fold != getattr(self.config.head, "fold", False):
            raise ValueError("head.fold and query_head.fold differ: queries and documents would not share terms; set both")
        query_head = self.config.query_head.build()
        query_head.attach(self.backbone, self.tokenizer)
        return query_head

    @property
    def kind(self) -> Kind:
        """What :meth:`encode` gives: ``dense`` vectors, ``sparse`` weights over the vocabulary, or ``tokens``' vectors."""
        return getattr(self.head, "kind", "dense")

    @property
    def sided(self) -> bool:
        """Whether queries and documents are encoded differently by more than their prompts."""
        if self.query_head is not None or self.config.tokenizer.sided:
            return True
        return getattr(self.head, "sided", False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.backbone.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the backbone's weights."""
        return next(self.backbone.parameters()).dtype

    @property
    def computed_in(self) -> str:
        """What vectors are computed in: ``int8``, or the name of :attr:`dtype`."""
        return "int8" if self.backbone.precision == "int8" else str(self.dtype).removeprefix("torch.")

    @property
    def max_length(self) -> int:
        """Tokens a text has at most unless a call says otherwise: the configuration's, and no more than has positions."""
        limit = self._positions
        return self.config.max_length if limit is None else min(self.config.max_length, limit)

    @property
    def token_budget(self) -> int:
        """Tokens of a micro-batch unless a call says otherwise: what suits the device."""
        return CPU_TOKEN_BUDGET if self.device.type == "cpu" else GPU_TOKEN_BUDGET

    def row_limit(self, max_length: int | None = None) -> int:
        """Returns the tokens a row may have under ``max_length`` (None: the model's); ``ValueError`` where that is too many."""
        limit = self._positions
        if max_length is None:
            return self.max_length
        if limit is not None and max_length > limit:
            raise ValueError(f"max_length {max_length} is more than the {limit} positions this model has learned")
        return max_length

    def encode(
        self, texts: Sequence[str], *, instruction: str = "", as_queries: bool = False, **options: Unpack[EncodeOptions]
    ) -> Encoded:
        """Returns the representations of ``texts``, in their order.

        A dense encoder gives float32 vectors ``(N, D)``, a sparse one a ``scipy.sparse.csr_matrix`` ``(N, V)``, one with
        token vectors :class:`openembed.token_vectors.TokenVectors`. Batch size and order do not change a vector.

        ``instruction`` is the literal text put before every text (``encode_queries`` renders it from a task). ``as_queries``:
        where the model encodes queries and documents differently (:attr:`sided`), as which. Options:
        ``max_length``: a longer text is cut to so many tokens. ``token_budget``: tokens a micro-batch, which bounds memory.
        ``progress`` draws a bar. Of dense vectors alone: ``normalize`` (True) gives them length 1, ``dimensions`` keeps the
        first of them, ``precision``: see :mod:`openembed.vectors` (``binary``: uint8, D / 8 columns; ``int8``: directions
        alone, compare them by cosine).

        Raises ``TypeError`` for a bare string, ``ValueError`` when the instruction leaves no room for the text,
        ``max_length`` is more than the model has positions for, a vector is not finite, or the model has fewer ``dimensions``.
        """
        return self._encode(texts, instruction, options, as_queries=as_queries)

    def _encode(self, texts: Sequence[str], instruction: str, options: EncodeOptions, *, as_queries: bool) -> Encoded:
        if not options.keys() <= EncodeOptions.__annotations__.keys():
            unknown = sorted(options.keys() - EncodeOptions.__annotations__.keys())
            raise TypeError(f"encode has no option {unknown[0]!r}; it takes {', '.join(EncodeOptions.__annotations__)}")
        if as_queries and not instruction and (look_up := self._look_up) is not None:
            if options:
                self._require_plain(options)
            limit = self.row_limit(options.get("max_length"))
            return look_up(*self.tokenizer.bodies(texts, limit, queries=True))
        sides = np.full(len(texts), as_queries) if self.sided and not isinstance(texts, str) else None
        rows = self.tokenize(texts, instruction, options.get("max_length"), queries=sides)
        taken, normalize = self._gathered(rows, options), self.kind == "dense" and options.get("normalize", True)
        budget = options.get("token_budget")
        budget = self.token_budget if budget is None else budget
        most_texts = max(1, WEIGHTS_AT_ONCE // self.width) if self.kind == "sparse" else None
        self._warn_of_full_rows(as_queries)
        with (
            inference(self),
            torch.inference_mode(),
            progress_bar("encode", len(rows), "texts", show=options.get("progress", False)) as advance,
        ):
            for indices in rows.micro_batches(budget, most_texts):
                values_RD = self(pack(rows, indices, self.device))
                values_RD = F.normalize(values_RD, dim=-1) if normalize else values_RD
                taken.put(indices, self._finite(values_RD.cpu().numpy(), rows, indices))
                advance(len(indices))
        return taken.result()

    def _gathered(self, rows: TokenRows, options: EncodeOptions) -> Gathered:
        """What takes the representations of ``rows`` in the form asked for; ``ValueError`` for one this kind does not have."""
        if self.kind == "dense":
            normalize = options.get("normalize", True)
            out = self._format(options.get("dimensions"), options.get("precision", "float32"), normalize)
            return GatheredDense(len(rows), self.width, out, normalize=normalize)
        self._require_plain(options)
        return gathered(self.kind, self.rows_of(rows), self.width)

    def _require_plain(self, options: EncodeOptions) -> None:
        if not options.get("normalize", True):
            raise ValueError(f"normalize: the head decides it where vectors are {self.kind}; leave it out")
        for name, plain in (("dimensions", None), ("precision", "float32")):
            if options.get(name, plain) != plain:
                raise ValueError(
                    f"{name}: only dense vectors can be cut or rounded, this model's are {self.kind}; leave it out"
                )

    def rows_of(self, rows: TokenRows) -> np.ndarray:
        """Returns how many rows of :meth:`forward` each text has, int64 (N): one, or one a token vector."""
        return self.head.rows_of(rows) if self.kind == "tokens" else np.ones(len(rows), dtype=np.int64)

    def represent(self, values_RD: Tensor, rows: TokenRows) -> Representation:
        """Returns the rows of :meth:`forward` for all texts of ``rows``, in their order, as what they are."""
        if self.kind == "dense":
            return Dense(values_RD)
        if self.kind == "sparse":
            return Sparse(values_RD, self.head.bag(rows, values_RD.device))
        return Tokens(values_RD, torch.from_numpy(self.rows_of(rows)).to(values_RD.device))

    def _format(self, dimensions: int | None, precision: Precision, normalize: bool) -> VectorFormat:
        """The format asked for, having warned once where the model was not trained to be cut."""
        out = parse(VectorFormat, {"dimensions": dimensions, "precision": precision}, "encode")
        if precision == "int8" and not normalize:
            raise ValueError("int8 vectors without their scales have no lengths; normalize, or use openembed.vectors.quantize")
        warning = truncation_warning(self.config.matryoshka, dimensions, self.width)
        if warning and not self._warned:
            logger.warning(warning)
            self._warned = True
        return out

    def _warn_of_full_rows(self, as_queries: bool) -> None:
        """Says once that documents have a weight for every term, which an index would keep."""
        if not as_queries and not self._warned and getattr(self.config.head, "keeps_all", False):
            logger.warning(
                f"head.activation = 'elu1p' is never 0, and head.document keeps all: documents have weights for all "
                f"{self.width:,} terms; give head.document a top_k (Encoder.with_gates does) before documents are indexed"
            )
            self._warned = True

    def _finite(self, values_RD: np.ndarray, rows: TokenRows, indices: np.ndarray) -> np.ndarray:
        """``values_RD``, checked at once: hours of work must not end in an error that was there in the first batch."""
        bad = np.flatnonzero(~np.isfinite(values_RD).all(axis=1))
        if len(bad):
            text = np.repeat(indices, self.rows_of(rows.select(indices)))[bad[0]]
            row, advice = int(text), "its weights are damaged"
            advice = advice if self.dtype == torch.float32 else "load with dtype='float32'"
            raise ValueError(f"text {row} gave a vector that is not finite in {self.dtype}; {advice}")
        return values_RD

    def encode_queries(
        self, texts: Sequence[str], *, task: str | None = None, instruction: str | None = None, **options: Unpack[EncodeOptions]
    ) -> Encoded:
        """Returns what :meth:`encode` does, for queries under a ``task``, an ``instruction`` or the model's own query prompt.

        ``options`` are those of :meth:`encode`.
        """
        return self._encode(texts, self.query_prompt(task, instruction), options, as_queries=True)

    def encode_documents(
        self, texts: Sequence[str], *, task: str | None = None, instruction: str | None = None, **options: Unpack[EncodeOptions]
    ) -> Encoded:
        """Returns what :meth:`encode` does; documents carry no instruction unless one is asked for or the model has one."""
        return self.encode(texts, instruction=self.document_prompt(task, instruction), **options)

    def query_prompt(self, task: str | None = None, instruction: str | None = None) -> str:
        """Returns the literal prefix of queries; raises ``ValueError`` for an unknown task or both given."""
        prompts = self.config.prompts
        if task is not None and instruction is not None:
            raise ValueError("give task or instruction, not both")
        if instruction is not None:
            return prompts.render(instruction)
        if task is None:
            return prompts.query
        return prompts.named[task] if task in prompts.named else prompts.render(self._task(task).query)

    def document_prompt(self, task: str | None = None, instruction: str | None = None) -> str:
        """Returns the literal prefix of documents (empty for most models); raises what :meth:`query_prompt` does."""
        prompts = self.config.prompts
        if task is not None and instruction is not None:
            raise ValueError("give task or instruction, not both")
        if instruction is not None:
            return prompts.render(instruction)
        if task is None or task in prompts.named:
            return prompts.document
        return prompts.render(self._task(task).document) or prompts.document

    def _task(self, task: str) -> TaskInstruction:
        known = self.config.prompts.tasks
        if task not in known:
            names = ", ".join(sorted([*known, *self.config.prompts.named])) or "none; pass instruction= instead"
            raise ValueError(f"unknown task {task!r}; this model knows: {names}")
        return known[task]

    def tokenize(
        self,
        texts: Sequence[str],
        instructions: str | Sequence[str] = "",
        max_length: int | None = None,
        *,
        queries: np.ndarray | None = None,
    ) -> TokenRows:
        """Returns the token rows of ``texts``; ``instructions`` is one literal prefix, or one a text.

        ``queries`` (bool, N): which are queries, for an encoder that is :attr:`sided`.
        """
        rows = self.tokenizer(texts, instructions, self.row_limit(max_length), queries)
        if self.sided:
            rows = replace(rows, queries=np.zeros(len(rows), dtype=bool) if queries is None else queries)
        if self.tokenizer.vocabulary > self.backbone.vocabulary:
            self._require_known(rows)
        return rows

    def _require_known(self, rows: TokenRows) -> None:
        for i, row in enumerate(rows.ids):
            if row.max() >= self.backbone.vocabulary:
                name = self.tokenizer.backend.id_to_token(int(row.max()))
                raise ValueError(
                    f"text {i} has the token {name!r}, for which the model's {self.backbone.vocabulary} rows hold none"
                )

    def forward(self, packed: Packed) -> Tensor:
        """Returns the rows of one micro-batch, ``(R, D)`` float32, not normalised, differentiable: one a text, or one a token
        vector (see :meth:`rows_of`)."""
        if torch.is_grad_enabled():
            self._fingerprint = None  # training changes it at every step
        if packed.query and self.query_head is not None:
            return self.query_head(packed)
        reads = getattr(self.head, "reads_states", None)
        hidden_TD = self.backbone(packed) if reads is None or reads(packed) else None
        values_RD = self.head(hidden_TD, packed)
        for projection in self.projections:
            values_RD = projection(values_RD)
        return values_RD

    def with_pool(self, pool: TokenPoolConfig | None) -> Encoder:
        """Returns this encoder keeping fewer vectors a text (all: None); both share their weights.

        Raises ``ValueError`` for an encoder that does not have a vector a token.
        """
        if not isinstance(self.config.head, TokenProjectionConfig):
            raise ValueError(f"pool: only vectors a token can be pooled, this model's are {self.kind}")
        return self._with_head(self.config.head.model_copy(update={"pool": pool}))

    def with_gates(self, *, query: SideConfig | None = None, document: SideConfig | None = None) -> Encoder:
        """Returns this encoder keeping other parts of its weights over the vocabulary; both share the model's.

        ``query``, ``document``: what is kept of a side, all of it anew; None leaves the side as it is. With the gate
        ``bag_of_words`` that side runs no model. Raises ``ValueError`` for an encoder without such a head, for queries that
        are looked up, and for settings that go ill together.
        """
        head = self.config.head
        if not isinstance(head, SpladeConfig):
            raise ValueError(f"gates: only weights over the vocabulary have them, this model gives {CALLED[self.kind]}")
        if query is not None and self.query_head is not None:
            raise ValueError("query: this model looks its queries up and runs no model for them; give document alone")
        sides = {"query": query or head.query, "document": document or head.document}
        changed = {name: side.model_dump() for name, side in sides.items()}
        return self._with_head(parse(SpladeConfig, {**head.model_dump(), **changed}, "gates"))

    def _with_head(self, config: HeadConfig) -> Encoder:
        """This encoder with other settings of a head of the same weights, which both then have."""
        changed = self.config.model_copy(update={"head": config})
        other = Encoder(changed, self.tokenizer, self.backbone, config.build(self.backbone.width))
        for name, part in self.named_children():
            if part is not self.backbone:
                getattr(other, name).load_state_dict(part.state_dict(), assign=True)
        return other.to(self.device).train(self.training)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over configuration, weights and what the tokenizer does, computed once a state of the weights.

        Weights count in bfloat16, so a model has one fingerprint whether it is loaded in float32 or bfloat16. Settings
        at their defaults do not count, so a new setting leaves the fingerprints of existing models as they are.
        """
        state = self.state_dict()
        versions = tuple(state), version(*state.values())
        if self._fingerprint is None or self._fingerprint[0] != versions:
            settings = chosen(self.config.model_copy(update={"tokenizer_path": None, "matryoshka": ()}))
            settings["backbone"] = {k: v for k, v in settings["backbone"].items() if k not in ORIGIN}
            rows = [row.tolist() for row in self.tokenizer(FINGERPRINT_TEXTS).ids]
            digest = hashlib.sha256(json.dumps([settings, rows], sort_keys=True).encode())
            for name, tensor in sorted(state.items()):
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().to(torch.bfloat16).cpu().contiguous().flatten().view(torch.uint8).numpy())
            self._fingerprint = (versions, digest.hexdigest())
        return self._fingerprint[1]

    def save(self, path: str | Path, *, layout: str = "openembed", named_prompts: bool = False) -> None:
        """Writes the encoder to folder ``path``: openembed's own files and a sentence-transformers layout, all or nothing.

        ``layout``: ``pylate`` or ``colbert`` write a model with a vector a token as PyLate or Stanford's ColBERT do instead,
        ``opensearch`` or ``splade`` a sparse one as OpenSearch (queries by table) or naver do, to a new folder; ``ValueError``
        names the settings that these cannot say. ``named_prompts``: see
        :func:`openembed.checkpoints.multi_vector_layouts.save_layout`; ``ValueError`` with any layout but ``pylate``.
        """
        check_layout(path, layout, named_prompts=named_prompts)
        if layout == "openembed":
            from openembed.checkpoints.native import save_encoder

            return save_encoder(self, path)
        if layout in SPARSE_LAYOUTS:
            from openembed.checkpoints.sparse_layouts import save_sparse_layout

            return save_sparse_layout(self, path, layout)
        from openembed.checkpoints.multi_vector_layouts import save_layout

        return save_layout(self, path, layout, named_prompts=named_prompts)
