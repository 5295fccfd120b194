"""Hard-negative mining: the best-ranked documents of a teacher that are unlikely to be unlabelled positives.

NV-Retriever (arXiv 2407.15831), NV-Embed v2 section 4. Bounded memory whatever the number of documents and queries: vectors
are written by resumable bulk encoding and memory-mapped, queries go in blocks, documents in blocks with a running top for
each query, and mined rows are appended in journalled blocks: a killed run goes on and ends with the same bytes.

Peak memory beside the encoder's own and the examples given (Q = ``block`` queries, B = 4,096 documents, K = 2 · (pool + skip)
+ positives fetched, D width, N documents): 4·Q·B + 12·Q·(2K + B) bytes for scores and the running top, 4·B·D for a block of
vectors, and 44·N for what tells documents apart (hashes, lengths and offsets; while they are written also Python's set of
their identities). With the defaults, 384 dimensions and a million documents: 80 MB, 6 MB and 44 MB.

    OUT/mined.jsonl   examples with negatives, teacher scores, ranks and policy
    OUT/audit.json    see :mod:`openembed.data.audit`
    OUT/meta.json     how they were made; written last
    OUT/pool.jsonl, OUT/pool/   with ``keep_pool``: every query's ranking, so that :func:`reapply` can use another policy
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from openembed.bulk import EncodesChunks, EncodesTexts
from openembed.data.audit import Audit, sample, sampled_rows, summary
from openembed.data.candidates import Candidates, Exclude
from openembed.data.corpus import Corpus, write_corpus
from openembed.data.examples import example_line, parse_example, write_examples
from openembed.data.journal import META, Journal
from openembed.data.select import Picked, PolicyConfig, Ranking, ceiling, pick
from openembed.data.teachers import Bm25Teacher, Prompted, RandomTeacher, Teacher, encoder_teacher, scale_of
from openembed.files import fsync_directory, read_json, read_jsonl, write_json
from openembed.locks import exclusive
from openembed.progress import progress
from openembed.records import Document, Example
from openembed.rerankers import Reranker, Scale
from openembed.seeds import generator

MINED, POOL, AUDIT = "mined.jsonl", "pool.jsonl", "audit.json"
WORK, KEPT = "work", "pool"


class MineConfig(PolicyConfig):
    """Who ranks, and what to take of the ranking (:class:`openembed.data.select.PolicyConfig`).

    ``instruction``, ``document_instruction``, ``template`` and ``document_template`` are the prompts of an ``encoder`` teacher
    (:class:`openembed.data.teachers.Prompted`), ``max_length`` its tokens a text; ``language`` is BM25's. ``near``: documents
    that share at least this part of their distinct words (Jaccard) with a positive are copies of it and never mined; 1: equal
    texts only. ``block``: queries at a time. ``keep_pool`` keeps rankings and documents for :func:`reapply`.
    """

    teacher: Literal["encoder", "bm25", "random"] = "encoder"
    instruction: str = ""
    document_instruction: str = ""
    template: str | None = None
    document_template: str | None = None
    max_length: int | None = Field(default=None, ge=1)
    language: str = "en"
    near: float = Field(default=0.95, gt=0, le=1)
    block: int = Field(default=1024, ge=1)
    keep_pool: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Mined:
    """Examples with mined negatives and teacher scores, where each came from, and the counts of the audit.

    ``notes`` has one entry an example: teacher, policy, ranks of its negatives; pass both to ``write_examples``.
    """

    examples: list[Example]
    notes: list[dict[str, Any]]
    report: dict[str, Any]


@dataclass(frozen=True)
class MinedFolder:
    """The finished output of :func:`mine_folder` or :func:`reapply`."""

    folder: Path
    source: str

    @property
    def audit(self) -> dict[str, Any]:
        """The counts, histograms and samples of ``audit.json``."""
        return read_json(self.folder / AUDIT)

    def rows(self) -> Iterator[tuple[Example, dict[str, Any]]]:
        """Yields each example with its note."""
        for number, row in read_jsonl(self.folder / MINED):
            yield parse_example(row, self.source, f"{self.folder / MINED}:{number}"), {"mined": row["mined"]}


def mine(
    examples: Sequence[Example],
    corpus: Iterable[Document],
    config: MineConfig,
    encoder: EncodesTexts | EncodesChunks | None = None,
    *,
    reranker: Reranker | None = None,
    exclude: Exclude | None = None,
) -> Mined:
    """Returns what :func:`mine_folder` writes, in memory."""
    with tempfile.TemporaryDirectory(prefix="openembed-mine-") as folder:
        done = mine_folder(examples, corpus, folder, config, encoder, reranker=reranker, exclude=exclude)
        rows, audit = list(done.rows()), done.audit
    return Mined([e for e, _ in rows], [note for _, note in rows], {k: v for k, v in audit.items() if k != "samples"})


def mine_folder(
    examples: Sequence[Example],
    corpus: Iterable[Document],
    out: str | Path,
    config: MineConfig,
    encoder: EncodesTexts | EncodesChunks | None = None,
    *,
    reranker: Reranker | None = None,
    exclude: Exclude | None = None,
    restart: bool = False,
) -> MinedFolder:
    """Writes ``examples`` with their negatives replaced by mined ones to the folder ``out``; a query may end with none.

    Never mined: a known positive (by id, or by equal or nearly equal text), the query's own text, a second copy of a text,
    and whatever ``exclude(example, document)`` is true of. ``corpus`` and ``examples`` share document ids; positives that
    ``corpus`` lacks are added to it, so an empty one mines among all positives. A ``reranker`` scores the teacher's ranking
    anew: then ranks, ceiling and recorded scores are all its own. Run again, it goes on where it was killed.

    Raises ``ValueError`` when the encoder teacher is missing, the policy does not fit the scores, or ``out`` was begun with
    other data or settings (unless ``restart``).
    """
    if config.teacher == "encoder" and encoder is None:
        raise ValueError("mining with teacher = 'encoder' needs an encoder; pass one or set teacher = 'bm25'")
    scale, source = _scale(config, encoder, reranker), _source(examples)
    config.check_scale(scale, reranker.name if reranker else config.teacher)
    out = Path(out)
    work = out / WORK
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out):
        if restart:
            _forget(out)
        work.mkdir(exist_ok=True)
        documents = write_corpus(work, corpus, examples)
        prompted = _prompted(encoder, config) if config.teacher == "encoder" else None
        name = _name(config.teacher if prompted is None else prompted.fingerprint, reranker)
        plan = _plan(examples, documents, config, name, prompted)
        plan |= {"source": source, "exclude": exclude is not None, "scale": scale}
        journal = Journal(out, plan, (MINED, POOL) if config.keep_pool else (MINED,), restart=restart)
        if not journal.finished:
            teacher = _teacher(prompted, examples, documents, config, work)
            found = Candidates(examples, documents, config.near, teacher, reranker, exclude)
            _mine_blocks(_Run(examples, documents, config, name, found, journal), found.rankings)
            if config.keep_pool:
                _keep(work, out / KEPT, examples)
            journal.finish()
        shutil.rmtree(work)
    return MinedFolder(out, source)


def reapply(
    mined: str | Path, out: str | Path, policy: PolicyConfig, *, seed: int | None = None, restart: bool = False
) -> MinedFolder:
    """Writes the queries of a finished folder with the negatives that another ``policy`` takes of the kept rankings.

    No teacher is needed. Raises ``ValueError`` when the folder was mined without ``keep_pool``, when the policy looks deeper
    than was kept, or wants ``random`` documents, which have no scores there.
    """
    mined, out = Path(mined), Path(out)
    if not (mined / META).exists() or not (mined / POOL).exists():
        raise ValueError(f"{mined}: no finished mining with its pool; mine with keep_pool (--keep-pool) first")
    if out.resolve() == mined.resolve():
        raise ValueError(f"{out}: cannot take the place of the mining it is made of; choose another folder")
    plan = read_json(mined / META)
    before = MineConfig.model_validate(plan["config"])
    if policy.pool + policy.skip > before.pool + before.skip:
        raise ValueError(f"pool {policy.pool} after {policy.skip} is deeper than what was kept ({before.pool + before.skip})")
    if policy.short == "random":
        raise ValueError("short = 'random' needs the teacher's scores of random documents; mine anew")
    policy.check_scale(plan["scale"], plan["teacher"])
    changed = {name: getattr(policy, name) for name in PolicyConfig.model_fields}
    config = before.model_copy(update={**changed, "seed": before.seed if seed is None else seed, "keep_pool": False})
    source = plan["source"]
    rows = read_jsonl(mined / KEPT / "examples.jsonl")
    examples = [parse_example(row, source, f"{mined}:{number}") for number, row in rows]
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out):
        plan = {**plan, "config": config.model_dump(mode="json"), "from": plan["config"]}
        journal = Journal(out, plan, (MINED,), restart=restart)
        if not journal.finished:
            run = _Run(examples, Corpus(mined / KEPT), config, plan["teacher"], None, journal)
            stored = read_jsonl(mined / POOL)
            for _ in range(journal.done):
                next(stored)
            _mine_blocks(run, lambda part, _wanted: [_stored(next(stored)[1]) for _ in part])
            journal.finish()
    return MinedFolder(out, source)


@dataclass(frozen=True)
class _Run:
    """What the blocks of one run share; ``found`` is None where only kept rankings are there."""

    examples: Sequence[Example]
    documents: Corpus
    config: MineConfig
    teacher: str
    found: Candidates | None
    journal: Journal

    def generator(self, purpose: str, number: int) -> np.random.Generator:
        return generator(self.config.seed, "mine", purpose, number)


def _mine_blocks(run: _Run, rankings: Callable[[range, int], list[Ranking]]) -> None:
    """Appends the rows of every block that is not there yet, then writes the audit."""
    config, journal, count = run.config, run.journal, len(run.examples)
    reports = list(journal.reports())
    audit = Audit(config.keep, reports[-1]["counts"] if reports else None)
    shown = sampled_rows(count, config.seed) if count else set()
    with progress("mine", count, "queries") as advance:
        advance(journal.done)
        for start in range(journal.done, count, config.block):
            part = range(start, min(start + config.block, count))
            ranked = rankings(part, config.pool + config.skip)
            first = [pick(config, r, run.generator("sample", n)) for n, r in zip(part, ranked, strict=True)]
            picks = _fill(run, part, ranked, first)
            audit.add_block(ranked, picks, first)
            lines = [_line(run, n, r, p) for n, r, p in zip(part, ranked, picks, strict=True) if p is not None]
            blocks = {MINED: "".join(lines).encode("utf-8")}
            if config.keep_pool:
                blocks[POOL] = "".join(map(_pool_line, ranked)).encode()
            samples = [_sample(run, n, ranked[n - start], picks[n - start] or first[n - start]) for n in part if n in shown]
            journal.append(len(part), blocks, {"counts": audit.state, "samples": samples})
            advance(len(part))
    samples = [item for report in journal.reports() for item in report["samples"]]
    write_json(journal.folder / AUDIT, summary(_source(run.examples), run.teacher, config, audit.state, samples))


def _fill(run: _Run, part: range, ranked: list[Ranking], first: list[Picked]) -> list[Picked | None]:
    """What ``config.short`` makes of the queries with fewer than ``keep`` survivors."""
    config, picks = run.config, list(first)
    short = [place for place, picked in enumerate(first) if picked.survivors < config.keep]
    if config.short == "keep" or not short:
        return picks
    if config.short == "drop":
        return [None if place in set(short) else picked for place, picked in enumerate(first)]
    limits = {place: ceiling(config, ranked[place].positive_scores) for place in short}
    if config.short == "relax":
        for place in short:
            picks[place] = _from_ranking(config, ranked[place], picks[place], limits[place])
        short = [place for place in short if len(picks[place].documents) < config.keep]
    if run.found is None:
        return picks
    if config.short == "relax":
        deeper = run.found.deeper([part[p] for p in short], np.array([limits[p] for p in short]), config.skip + 3 * config.keep)
    else:
        deeper = [run.found.random(part[p], 4 * config.keep, run.generator("random", part[p])) for p in short]
    for place, more in zip(short, deeper, strict=True):
        seen = np.concatenate([ranked[place].documents, picks[place].documents])
        texts = run.documents.text_N[seen]
        new = ~np.isin(run.documents.text_N[more.documents], texts) & (more.scores.astype(np.float64) < limits[place])
        new = np.flatnonzero(new)[: config.keep - len(picks[place].documents)]
        picks[place] = picks[place].with_fill(more.documents[new], more.scores[new], more.ranks[new])
    return picks


def _from_ranking(config: MineConfig, ranking: Ranking, picked: Picked, limit: float) -> Picked:
    """Fills up from the part of the ranking below the pool that was fetched anyway."""
    places = np.arange(len(ranking.documents))[config.skip + config.pool :]
    places = places[ranking.scores[places].astype(np.float64) < limit][: config.keep - len(picked.documents)]
    return picked.with_fill(ranking.documents[places], ranking.scores[places], places + 1)


def _line(run: _Run, number: int, ranking: Ranking, picked: Picked) -> str:
    example = run.examples[number]
    negatives = tuple(run.documents[int(document)] for document in picked.documents)
    scored = Example(
        example.query, example.positives, negatives, example.source, _plain(ranking.positive_scores), _plain(picked.scores)
    )
    note = {"teacher": run.teacher, "policy": run.config.label, "ranks": picked.ranks.tolist()}
    return example_line(scored, {"mined": note})


def _sample(run: _Run, number: int, ranking: Ranking, picked: Picked) -> dict[str, Any]:
    limit = ceiling(run.config, ranking.positive_scores)
    return sample(run.examples[number], ranking, picked, limit, run.documents.__getitem__)


def _pool_line(ranking: Ranking) -> str:
    row = {"documents": ranking.documents.tolist(), "scores": _plain(ranking.scores)}
    row |= {"positives": ranking.positives.tolist(), "positive_scores": _plain(ranking.positive_scores)}
    return json.dumps({**row, "passed": ranking.passed}) + "\n"


def _stored(row: dict[str, Any]) -> Ranking:
    integers = {key: np.array(row[key], dtype=np.int64) for key in ("documents", "positives")}
    floats = {key: np.array(row[key], dtype=np.float32) for key in ("scores", "positive_scores")}
    return Ranking(passed=row["passed"], **integers, **floats)


def _plain(scores: np.ndarray) -> tuple[float, ...]:
    """The shortest decimal numbers that read back as the same float32."""
    return tuple(float(f"{score:.9g}") for score in scores.tolist())


def _teacher(
    prompted: Prompted | None, examples: Sequence[Example], documents: Corpus, config: MineConfig, work: Path
) -> Teacher:
    if config.teacher == "random":
        return RandomTeacher(len(documents), config.seed)
    if prompted is None:
        queries = [example.query.text for example in examples]
        return Bm25Teacher(queries, (document.full_text for document in documents), work, config.language)
    return encoder_teacher(prompted, examples, documents, work, config.max_length)


def _prompted(encoder: Any, config: MineConfig) -> Prompted | EncodesChunks:
    names = ("instruction", "document_instruction", "template", "document_template")
    prompted = partial(Prompted, **{name: getattr(config, name) for name in names})
    return encoder.wrap(prompted) if isinstance(encoder, EncodesChunks) else prompted(encoder)


def _name(first: str, reranker: Reranker | None) -> str:
    return first if reranker is None else f"{reranker.name} over {first}"


def _scale(config: MineConfig, encoder: Any, reranker: Reranker | None) -> Scale:
    if reranker is not None:
        return reranker.scale
    if config.teacher == "encoder":
        return scale_of(getattr(encoder, "kind", "dense"))
    return {"bm25": Bm25Teacher, "random": RandomTeacher}[config.teacher].scale


def _plan(
    examples: Sequence[Example], documents: Corpus, config: MineConfig, name: str, prompted: Prompted | None
) -> dict[str, Any]:
    """Everything the bytes of the output depend on."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example_line(example, {"source": example.source}).encode())
    prompts = None if prompted is None else [prompted.query_prompt(), prompted.document_prompt()]
    return {
        "examples": digest.hexdigest(),
        "documents": documents.digest,
        "teacher": name,
        "prompts": prompts,
        "config": config.model_dump(mode="json"),
    }


def _forget(out: Path) -> None:
    """Removes vectors and rankings of other data, which the journal does not know of."""
    for name in (WORK, KEPT):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in (META, POOL):
        (out / name).unlink(missing_ok=True)


def _keep(work: Path, kept: Path, examples: Sequence[Example]) -> None:
    """Puts aside what another policy will need."""
    shutil.rmtree(kept, ignore_errors=True)  # what a killed run left
    kept.mkdir()
    for path in (work / "documents.jsonl", work / "documents.npz"):
        shutil.copyfile(path, kept / path.name)
    write_examples(kept / "examples.jsonl", examples)
    fsync_directory(kept)


def _source(examples: Sequence[Example]) -> str:
    sources = {example.source for example in examples}
    if len(sources) > 1:
        raise ValueError(f"mine one source at a time, each in its own documents; got {', '.join(sorted(sources))}")
    return sources.pop() if sources else ""
