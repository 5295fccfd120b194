"""Which text goes before a task's queries, documents and symmetric texts, decided as mteb decides it.

In order: the instruction the caller gives; the model's own entry for the task; its entry for its kind; then, for a
model that has an instruction table (so it was trained with instructions), the kind's general instruction; else the
model's plain query and document prompts, and nothing before symmetric texts (STS, classification, clustering, pairs).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# mteb's names of the kinds and the default instruction of their abstract classes
KIND_NAMES = {
    "retrieval": "Retrieval",
    "reranking": "Reranking",
    "sts": "STS",
    "pair_classification": "PairClassification",
    "classification": "Classification",
    "clustering": "Clustering",
}
KIND_INSTRUCTIONS = {
    "retrieval": "Retrieve text based on user query.",
    "reranking": "Retrieve text based on user query.",
    "sts": "Retrieve semantically similar text.",
    "pair_classification": "Retrieve text that are semantically similar to the given text.",
    "classification": "Classify user passages.",
    "clustering": "Identify categories in user passages.",
}


@dataclass(frozen=True, slots=True)
class Prompts:
    """The literal prefixes of queries, documents and symmetric texts, and the arguments the encoder makes them from."""

    query: str
    document: str
    symmetric: str
    query_arguments: dict[str, str]
    document_arguments: dict[str, str]


def choose_prompts(
    encoder: Any, kind: str, names: Iterable[str], instruction: str | None, document_instruction: str | None
) -> Prompts:
    """Returns the prompts of a task of ``kind`` known under ``names``.

    ``instruction`` and ``document_instruction`` override what the model knows; an empty string means none.
    """
    table = encoder.config.prompts
    known = find_entry((*table.tasks, *table.named), (*names, KIND_NAMES[kind]))
    query: dict[str, str] = {}
    document: dict[str, str] = {}
    if instruction is not None:
        query = {"instruction": instruction}
    elif known is not None:
        query, document = {"task": known}, {"task": known}
    elif table.tasks and not table.query:
        query = {"instruction": KIND_INSTRUCTIONS[kind]}
    if document_instruction is not None:
        document = {"instruction": document_instruction}
    return Prompts(
        query=encoder.query_prompt(**query),
        document=encoder.document_prompt(**document),
        symmetric=encoder.query_prompt(**query) if query else "",
        query_arguments=query,
        document_arguments=document,
    )


def find_entry(entries: Iterable[str], names: Iterable[str]) -> str | None:
    """Returns the entry for the first of ``names`` that has one; only letters and digits count, not their case.

    An equal name wins, then the longest entry that begins the name (``STS`` for ``STS13``), then the only entry that the
    name begins (``Banking77Classification`` for ``banking77``, ``STSBenchmark`` for ``stsb/en``).
    """
    spelled = {entry: plain(entry) for entry in entries if plain(entry)}
    for name in names:
        if name in spelled:
            return name
        begins = [entry for entry, letters in spelled.items() if plain(name).startswith(letters)]
        if begins:
            return max(begins, key=lambda entry: len(spelled[entry]))
        first = plain(name.split("/")[0])
        begun = [entry for entry, letters in spelled.items() if first and letters.startswith(first)]
        if len(begun) == 1:
            return begun[0]
    return None


def plain(name: str) -> str:
    """Returns the letters and digits of ``name``, in lower case."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
