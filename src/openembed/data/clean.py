"""Cleans sources of examples and files of texts: kept rows, what was removed and why, and counts over it.

The folder gets ``<name>.jsonl`` for each source and file, ``removed.jsonl`` (one line a removal) and ``report.json``,
which is written last: a folder that has it is whole.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from openembed.data.evaluation_texts import EvaluationTexts
from openembed.data.examples import write_examples
from openembed.data.filter import BLOCK, Decontaminator, FilterConfig, Match, cut
from openembed.data.overlap import SetIndex, WordHasher, Words, fingerprint, normalised
from openembed.files import atomic_write, read_jsonl, write_json
from openembed.progress import progress
from openembed.records import Document, Example

REMOVED, REPORT = "removed.jsonl", "report.json"
SAMPLES = 10
"""Removals of a reason that the report shows, spread over the file."""


@dataclass
class _Removals:
    """What is removed, in order, with the counts that the report gives."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    matched: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    negatives: Counter[str] = field(default_factory=Counter)

    def add(self, source: str, row: str, part: str, text: str, match: Match) -> None:
        """Records a removal. ``part``: the text of the row that is at fault; a ``negative`` alone leaves its row."""
        if part == "negative":
            self.negatives[source] += 1
        else:
            self.counts[source][match.reason] += 1
            self.matched[match.set][match.reason] += 1
        found = {"reason": match.reason, "score": match.score, "text": cut(text), "set": match.set, "match": match.text}
        self.rows.append({"source": source, "id": row, "part": part, **found})


def clean(
    sources: Mapping[str, Sequence[Example]],
    texts: Mapping[str, Path],
    evaluation: EvaluationTexts,
    config: FilterConfig,
    folder: Path,
) -> dict[str, Any]:
    """Writes the cleaned ``sources`` and ``texts`` (JSON-lines files with a ``text`` a row) to ``folder``.

    Returns the report. Duplicates are looked for over all sources, and apart from them over all files of texts, in order.
    Memory: the examples, 16 bytes a word of the texts, and about 200 bytes a word of the evaluation texts. Raises
    ``ValueError`` for a row without a text and for a name given twice.
    """
    if shared := set(sources) & set(texts):
        raise ValueError(f"a source and a file of texts are both named {min(shared)!r}; rename one")
    if REMOVED.removesuffix(".jsonl") in {*sources, *texts}:
        raise ValueError(f"'removed' names the list of what was removed ({REMOVED}); rename the source or file")
    (folder / REPORT).unlink(missing_ok=True)  # that of an earlier run
    finder = Decontaminator(evaluation, config)
    removals = _Removals()
    rows = {name: len(examples) for name, examples in sources.items()}
    kept = [
        (name, *row) for name, examples in sources.items() for row in _clean_examples(name, examples, finder, config, removals)
    ]
    for name, examples in _without_duplicates(list(sources), kept, config, removals).items():
        write_examples(folder / f"{name}.jsonl", examples)
        rows[name] = len(sources[name])
    left = {name: _find_in_file(name, path, finder, removals) for name, path in texts.items()}
    _duplicate_texts(texts, left, config, removals)
    for name, path in texts.items():
        rows[name] = len(left[name])
        with atomic_write(folder / f"{name}.jsonl") as file:
            for keep, (_, row) in zip(left[name], read_jsonl(path), strict=True):
                if keep:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return _write_report(rows, removals, evaluation, config, folder)


def _clean_examples(
    name: str, examples: Sequence[Example], finder: Decontaminator, config: FilterConfig, removals: _Removals
) -> Iterator[tuple[str, Example]]:
    """Yields (row, example) of the examples that stay, without negatives that are evaluation texts."""
    distinct = list(dict.fromkeys(text for example in examples for text in _texts(example)))
    found: dict[str, Match] = {}
    with progress(f"decontaminate {name}", len(distinct), "texts") as advance:
        for start in range(0, len(distinct), BLOCK):
            block = distinct[start : start + BLOCK]
            found |= {text: match for text, match in zip(block, finder.find(block), strict=True) if match is not None}
            advance(len(block))
    for number, example in enumerate(examples):
        row = example.query.id or str(number)
        if example.query.text in found:
            removals.add(name, row, "query", example.query.text, found[example.query.text])
            continue
        positives = [_match(document, found) for document in example.positives]
        bad = [index for index, match in enumerate(positives) if match is not None]
        if bad and (config.positives == "any" or len(bad) == len(positives)):
            removals.add(name, row, "positive", example.positives[bad[0]].full_text, positives[bad[0]])
            continue
        negatives = [_match(document, found) for document in example.negatives]
        for document, match in zip(example.negatives, negatives, strict=True):
            if match is not None:
                removals.add(name, row, "negative", document.full_text, match)
        yield row, _kept_documents(example, [m is None for m in positives], [m is None for m in negatives])


def _texts(example: Example) -> Iterator[str]:
    yield example.query.text
    for document in (*example.positives, *example.negatives):
        yield document.full_text
        if document.title:
            yield document.text


def _match(document: Document, found: Mapping[str, Match]) -> Match | None:
    return found.get(document.full_text) or found.get(document.text)


def _kept_documents(example: Example, positives: Sequence[bool], negatives: Sequence[bool]) -> Example:
    if all(positives) and all(negatives):
        return example

    def kept(values: tuple, marks: Sequence[bool]) -> tuple:
        return tuple(value for value, mark in zip(values, marks, strict=True) if mark) if values else ()

    return replace(
        example,
        positives=kept(example.positives, positives),
        positive_scores=kept(example.positive_scores, positives),
        negatives=kept(example.negatives, negatives),
        negative_scores=kept(example.negative_scores, negatives),
    )


def _without_duplicates(
    names: Sequence[str], rows: Sequence[tuple[str, str, Example]], config: FilterConfig, removals: _Removals
) -> dict[str, list[Example]]:
    """The examples of every source of ``names``, without those all of whose (query, positive) pairs an earlier example has."""
    first: dict[bytes, int] = {}
    stay = np.ones(len(rows), dtype=bool)
    for number, (name, row, example) in enumerate(rows):
        pairs = [fingerprint(example.query.text) + fingerprint(document.full_text) for document in example.positives]
        if config.duplicates != "none" and all(pair in first for pair in pairs):
            stay[number] = False
            source, _, original = rows[first[pairs[0]]]
            removals.add(name, row, "row", example.query.text, Match("duplicate", 1.0, source, cut(original.query.text)))
        for pair in pairs:
            first.setdefault(pair, number)
    if config.duplicates == "near":
        _near_examples(rows, stay, config, removals)
    kept: dict[str, list[Example]] = {name: [] for name in names}
    for number in np.flatnonzero(stay):
        name, _, example = rows[number]
        kept[name].append(example)
    return kept


def _near_examples(
    rows: Sequence[tuple[str, str, Example]], stay: np.ndarray, config: FilterConfig, removals: _Removals
) -> None:
    """Clears ``stay`` where both query and first positive are nearly those of an earlier example that stays."""
    numbers = np.flatnonzero(stay)
    words = WordHasher()([normalised(rows[number][2].query.text) for number in numbers])
    for one, other, similarity in _near_pairs(words, config):
        later, earlier = int(numbers[one]), int(numbers[other])
        if not stay[later] or not stay[earlier]:
            continue
        pair = [normalised(rows[number][2].positives[0].full_text) for number in (earlier, later)]
        index = SetIndex(WordHasher()(pair[:1]), config.shingle, config.jaccard)
        if pair[0] == pair[1] or any(True for _ in index.find(WordHasher()(pair[1:]))):
            stay[later] = False
            name, row, example = rows[later]
            source, _, original = rows[earlier]
            match = Match("near_duplicate_row", round(similarity, 4), source, cut(original.query.text))
            removals.add(name, row, "row", example.query.text, match)


def _near_pairs(words: Words, config: FilterConfig) -> Iterator[tuple[int, int, float]]:
    """Yields (later, earlier, Jaccard) of all texts that are nearly equal, by the later and then the earlier."""
    if not len(words):
        return
    index = SetIndex(words, config.shingle, config.jaccard)
    for start in range(0, len(words), BLOCK):
        for one, other, similarity in index.find(words.part(start, min(start + BLOCK, len(words)))):
            if other < start + one:
                yield start + one, other, similarity


def _find_in_file(name: str, path: Path, finder: Decontaminator, removals: _Removals) -> np.ndarray:
    """Which rows of a file of texts hold no evaluation text."""
    keep: list[bool] = []
    with progress(f"decontaminate {name}", None, "texts") as advance:
        for block in _blocks(path):
            for (row, text), match in zip(block, finder.find([text for _, text in block]), strict=True):
                keep.append(match is None)
                if match is not None:
                    removals.add(name, row, "text", text, match)
            advance(len(block))
    return np.array(keep, dtype=bool)


def _blocks(path: Path) -> Iterator[list[tuple[str, str]]]:
    """Yields lists of (id, text) of a JSON-lines file's rows."""
    block: list[tuple[str, str]] = []
    for line, row in read_jsonl(path):
        if not isinstance(row.get("text"), str):
            raise ValueError(f"{path}:{line}: 'text' must be a text, got {row.get('text')!r:.80}")
        block.append((str(row.get("_id", row.get("id", line))), row["text"]))
        if len(block) == BLOCK:
            yield block
            block = []
    if block:
        yield block


def _duplicate_texts(
    files: Mapping[str, Path], left: Mapping[str, np.ndarray], config: FilterConfig, removals: _Removals
) -> None:
    """Clears the rows in ``left`` whose text an earlier row of any file has, or nearly has."""
    if config.duplicates == "none" or not files:
        return
    first: dict[bytes, int] = {}
    hasher, parts, shown = WordHasher(), [], []
    """Of each text that stays: words, and (file, row number, id, the text as records show it)."""
    for name, path in files.items():
        number = 0
        for block in _blocks(path):
            staying = []
            for row, text in block:
                if left[name][number]:
                    known = first.setdefault(fingerprint(text), len(shown))
                    if known < len(shown):
                        left[name][number] = False
                        removals.add(name, row, "text", text, Match("duplicate", 1.0, shown[known][0], shown[known][3]))
                    else:
                        shown.append((name, number, row, cut(text)))
                        staying.append(normalised(text))
                number += 1
            parts.append(hasher(staying))
    if config.duplicates == "near":
        gone = np.zeros(len(shown), dtype=bool)
        for later, earlier, similarity in _near_pairs(Words.joined(parts), config):
            if not gone[later] and not gone[earlier]:
                gone[later] = True
                name, number, row, text = shown[later]
                left[name][number] = False
                match = Match("near_duplicate_row", round(similarity, 4), shown[earlier][0], shown[earlier][3])
                removals.add(name, row, "text", text, match)


def _write_report(
    rows: Mapping[str, int], removals: _Removals, evaluation: EvaluationTexts, config: FilterConfig, folder: Path
) -> dict[str, Any]:
    with atomic_write(folder / REMOVED) as file:
        for row in removals.rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    removed = {name: dict(sorted(removals.counts[name].items())) for name in rows}
    report = {
        "settings": config.model_dump(mode="json"),
        "sources": {
            name: {
                "rows": count,
                "kept": count - sum(removed[name].values()),
                "removed": removed[name],
                "negatives_removed": removals.negatives[name],
            }
            for name, count in rows.items()
        },
        "against": [{**row, "matched": dict(sorted(removals.matched[row["name"]].items()))} for row in evaluation.counts],
        "samples": _samples(removals.rows),
    }
    write_json(folder / REPORT, report)
    return report


def _samples(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Up to ten removals of each reason, spread evenly over them."""
    by_reason: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        by_reason[row["reason"]].append(row)
    chosen = []
    for found in by_reason.values():
        places = sorted({round(place) for place in np.linspace(0, len(found) - 1, SAMPLES)})
        chosen += [found[place] for place in places]
    return chosen
