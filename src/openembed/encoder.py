"""The encoder: texts in, vectors out. Tokenizer, backbone, head and prompts belong together here.

Shapes: ``N`` texts, ``B`` texts of a micro-batch, ``D`` width of the representation.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from openembed.backbones.text import BackboneConfig, TextBackbone
from openembed.config import Config
from openembed.heads import HeadConfig
from openembed.heads.projection import ProjectionConfig
from openembed.packing import Packed, TokenRows, micro_batches, pack
from openembed.progress import progress as progress_bar
from openembed.tokenization import TextTokenizer, TokenizerConfig

CPU_TOKEN_BUDGET = 1024
"""Tokens a micro-batch on a CPU: large enough for full-speed matrix products, small enough to stay in its caches."""

GPU_TOKEN_BUDGET = 65536


class TaskInstruction(Config):
    """What a task asks of its queries and, for symmetric tasks, of its documents; rendered through the template."""

    query: str
    document: str = ""


class PromptConfig(Config):
    """What is put before texts. ``query`` and ``document`` are literal prefixes used when nothing else is asked for.

    ``template`` renders an instruction (``{task}``); the paper's is ``"Instruct: {task}\\nQuery: "``. The default here
    ends in a line break instead of a space: no tokenizer merges across it, so the instruction's tokens are the same
    alone and before any text, and every library finds the same span. ``tasks`` names instructions; ``named`` names
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
    may have, instruction and special tokens included.
    """

    backbone: BackboneConfig
    head: HeadConfig
    projections: tuple[ProjectionConfig, ...] = ()
    tokenizer: TokenizerConfig = TokenizerConfig()
    tokenizer_path: str | None = None
    prompts: PromptConfig = PromptConfig()
    max_length: int = Field(512, gt=0)


class Encoder(nn.Module):
    """Turns texts into dense vectors.

    ``encode_queries`` and ``encode_documents`` are what retrieval needs; ``encode`` is the plain form. End tokens,
    truncation, the pooled span, batching and normalisation are the model's business, not the caller's.
    """

    def __init__(self, config: EncoderConfig, tokenizer: TextTokenizer, backbone: TextBackbone, head: nn.Module) -> None:
        super().__init__()
        self.config, self.tokenizer, self.backbone, self.head = config, tokenizer, backbone, head
        widths = [head.width, *(p.width for p in config.projections)]
        self.projections = nn.ModuleList(p.build(w) for p, w in zip(config.projections, widths, strict=False))
        self.width: int = widths[-1]
        self._fingerprint: tuple[object, str] | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.backbone.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the backbone's weights."""
        return next(self.backbone.parameters()).dtype

    def encode(
        self,
        texts: Sequence[str],
        *,
        instruction: str = "",
        max_length: int | None = None,
        normalize: bool = True,
        token_budget: int | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        """Returns float32 vectors ``(N, D)`` in the order of ``texts``, of length 1 unless ``normalize`` is false.

        ``instruction`` is the literal text put before every text (``encode_queries`` renders it from a task). A text
        longer than ``max_length`` tokens is cut. Batch size and order do not change a vector. ``token_budget``: tokens a
        micro-batch, which bounds memory. Raises ``TypeError`` for a bare string, ``ValueError`` when the instruction
        leaves no room for the text or a vector is not finite.
        """
        rows = self.tokenize(texts, instruction, max_length)
        out_ND = np.empty((len(rows), self.width), dtype=np.float32)
        budget = token_budget or (CPU_TOKEN_BUDGET if self.device.type == "cpu" else GPU_TOKEN_BUDGET)
        was_training = self.training
        self.eval()
        try:
            with torch.inference_mode(), progress_bar("encode", len(rows), "texts", show=progress) as advance:
                for indices in micro_batches(rows.lengths, budget):
                    values_BD = self(pack(rows, indices, self.device))
                    values_BD = F.normalize(values_BD, dim=-1) if normalize else values_BD
                    out_ND[indices] = values_BD.cpu().numpy()
                    advance(len(indices))
        finally:
            self.train(was_training)
        if not np.isfinite(out_ND).all():
            row = int(np.flatnonzero(~np.isfinite(out_ND).all(axis=1))[0])
            raise ValueError(f"text {row} gave a vector that is not finite in {self.dtype}; load with dtype='float32'")
        return out_ND

    def encode_queries(
        self, texts: Sequence[str], *, task: str | None = None, instruction: str | None = None, **options: object
    ) -> np.ndarray:
        """Returns query vectors ``(N, D)`` under a named ``task``, an ``instruction`` or the model's own query prompt.

        ``options`` are those of :meth:`encode`.
        """
        return self.encode(texts, instruction=self.query_prompt(task, instruction), **options)  # type: ignore[arg-type]

    def encode_documents(
        self, texts: Sequence[str], *, task: str | None = None, instruction: str | None = None, **options: object
    ) -> np.ndarray:
        """Returns document vectors ``(N, D)``; documents carry no instruction unless one is asked for or the model has one."""
        return self.encode(texts, instruction=self.document_prompt(task, instruction), **options)  # type: ignore[arg-type]

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
        """Returns the literal prefix of documents (empty for most models)."""
        prompts = self.config.prompts
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
        self, texts: Sequence[str], instructions: str | Sequence[str] = "", max_length: int | None = None
    ) -> TokenRows:
        """Returns the token rows of ``texts``; ``instructions`` is one literal prefix, or one a text."""
        return self.tokenizer(texts, instructions, max_length or self.config.max_length)

    def forward(self, packed: Packed) -> Tensor:
        """Returns the vectors of one micro-batch, ``(B, D)`` float32, not normalised, differentiable."""
        values_BD = self.head(self.backbone(packed), packed)
        for projection in self.projections:
            values_BD = projection(values_BD)
        return values_BD

    @property
    def fingerprint(self) -> str:
        """SHA-256 over configuration and weights, computed once a state of the weights.

        Weights count in bfloat16, so a model has one fingerprint whether it is loaded in float32 or bfloat16.
        """
        state = self.state_dict()
        versions = tuple((name, t.data_ptr(), t._version) for name, t in state.items())
        if self._fingerprint is None or self._fingerprint[0] != versions:
            origin = {"backbone": {"path", "revision", "architecture"}, "tokenizer_path": True}
            digest = hashlib.sha256(self.config.model_dump_json(exclude=origin).encode())
            for name, tensor in sorted(state.items()):
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().to(torch.bfloat16).cpu().contiguous().flatten().view(torch.uint8).numpy())
            self._fingerprint = (versions, digest.hexdigest())
        return self._fingerprint[1]

    def save(self, path: str | Path) -> None:
        """Writes the encoder to folder ``path``: openembed's own files and a sentence-transformers layout, all or nothing."""
        from openembed.checkpoints.native import save_encoder

        save_encoder(self, path)
