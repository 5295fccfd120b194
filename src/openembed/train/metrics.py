"""The metrics file and what goes into it."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openembed.files import atomic_write
from openembed.objectives import Loss
from openembed.records import Example
from openembed.train.cached import Prepared


class MetricsFile:
    """``metrics.jsonl``: one line a finished step, each step once however often the run was interrupted."""

    def __init__(self, path: str | Path, *, keep_steps: int) -> None:
        """Opens ``path`` and drops every line after step ``keep_steps``, and a last line cut short by a crash."""
        self.path = Path(path)
        kept = [line for line in self._lines() if line["step"] <= keep_steps]
        self._evaluation: dict[str, float] = next((line["evaluation"] for line in reversed(kept) if "evaluation" in line), {})
        with atomic_write(self.path) as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one line and hands it to the system, so that it survives the end of this process."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._evaluation = record.get("evaluation", self._evaluation)

    def last_evaluation(self) -> dict[str, float]:
        """Returns the newest evaluation's scores; empty when there was none."""
        return dict(self._evaluation)

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        lines = []
        for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
        return lines


def merge_losses(losses: Sequence[Loss]) -> dict[str, Any]:
    """Returns the metrics of the batches of one step: losses averaged, by rows where split by source; counts added.

    Counts and similarities are those that the objective gives.
    """
    rows: dict[str, int] = defaultdict(int)
    sums: dict[str, float] = defaultdict(float)
    for loss in losses:
        for name, count in loss.diagnostics.get("rows_by_source", {}).items():
            rows[name] += count
            sums[name] += loss.diagnostics["loss_by_source"][name] * count
    return {
        "loss": sum(loss.total.item() for loss in losses) / len(losses),
        "parts": {name: sum(loss.parts[name] for loss in losses) / len(losses) for name in losses[0].parts},
        "loss_by_source": {name: sums[name] / rows[name] for name in rows},
        "rows_by_source": dict(rows),
        **{name: sum(loss.diagnostics[name] for loss in losses) for name in _COUNTS if name in losses[0].diagnostics},
        "similarity": {
            name: _merge_similarity([loss.diagnostics["similarity"][name] for loss in losses])
            for name in losses[0].diagnostics.get("similarity", {})
        },
        **_merge_sparsity([loss.diagnostics["sparsity"] for loss in losses if "sparsity" in loss.diagnostics]),
    }


_COUNTS = ("rows_without_negatives", "false_negatives_masked")


def _merge_sparsity(found: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    return {"sparsity": {name: sum(one[name] for one in found) / len(found) for name in found[0]}} if found else {}


def _merge_similarity(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    count = sum(summary["count"] for summary in summaries)
    total = sum(summary["count"] * summary["mean"] for summary in summaries if summary["count"])
    return {
        "count": count,
        "mean": total / count if count else None,
        "histogram": [sum(bins) for bins in zip(*(summary["histogram"] for summary in summaries), strict=True)],
    }


def padded_tokens(prepared: Prepared) -> int:
    """Returns the tokens of the batch with queries and documents each padded to the longest of their kind."""
    lengths = prepared.rows.lengths
    sides = (lengths[prepared.batch.query_Q], lengths[prepared.batch.document_N])
    return sum(int(side.max()) * len(side) for side in sides)


def fingerprint(examples: Sequence[Example]) -> str:
    """Returns a hash of every text, id and score of ``examples``, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        documents = [*example.positives, *example.negatives]
        parts = [example.query.text, *(f"{d.id}\0{d.title}\0{d.text}" for d in documents)]
        scores = (len(example.positives), example.positive_scores, example.negative_scores)
        digest.update(repr((parts, scores)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
