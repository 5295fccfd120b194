"""``index``, ``search``, ``add``, ``update``, ``delete`` and ``compact``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openembed.cli.coding import Bits, CodedFrom, Encodings, SearchMethod, Vectors, coding_of
from openembed.cli.encode import Device, Dtype, Instruction, MaxLength, Normalize, Restart, encode_to, load_model, pace
from openembed.cli.output import JsonFlag, print_json, print_table
from openembed.packaged import NANO

if TYPE_CHECKING:
    from openembed.encoder import Encoder
    from openembed.index.store import ModelInfo, Store
    from openembed.index.tokens.files import TokenCoding
    from openembed.index.tokens.methods import Method

logger = logging.getLogger(__name__)
BM25 = "bm25"
WORDS_ALONE = "the index holds words alone"
TERMS = 12
"""Terms of a score that the table shows."""
SCORES = {
    "dense": "dot product of the vectors",
    "sparse": "sum of query weight times document weight over the terms",
    "tokens": "MaxSim: over the query's tokens, the sum of the greatest dot product with a token of the document",
    "bm25": "BM25 (k1 1.5, b 0.75)",
    "hybrid": "reciprocal rank fusion: sum of 1 / (60 + rank) over the rankings of the index's models and of BM25",
}
Corpus = Annotated[Path, typer.Argument(help="BEIR folder, JSONL(.gz), or text file (one text a line, blank ones skipped).")]
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A directory made by `openembed index`.")]
OtherModel = Annotated[str | None, typer.Option("--model", help="Where the model is now, if it moved.")]


def register(app: typer.Typer) -> None:
    """Adds the commands of this module to ``app``."""
    for command in (index, search, add, update, delete, compact):
        app.command()(command)


def index(
    corpus: Corpus,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the new index.")],
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Model folder or hub id: dense, sparse or token vectors; one of each by repeating it; bm25: words alone "
            "(default: openembed-nano, for English)."
        ),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            help="Of sparse weights (float32, float16, uint8) and token vectors (float32, float16; beside sparse weights in "
            "uint8 float32)."
        ),
    ] = "float32",
    bits: Bits = None,
    coded_from: CodedFrom = None,
    vectors: Vectors = None,
    encodings: Encodings = None,
    language: Annotated[str, typer.Option(help="Stemmer and stop words: en, pl, de, ..., or none.")] = "en",
    instruction: Instruction = None,
    normalize: Normalize = True,
    max_length: MaxLength = None,
    device: Device = None,
    dtype: Dtype = None,
    restart: Restart = False,
    as_json: JsonFlag = False,
) -> None:
    """Index documents for dense, sparse, multi-vector and BM25 search; run again after an interruption, encoding resumes."""
    import shutil

    from openembed.documents import check_texts, corpus_file, read_documents
    from openembed.index.lexical import analyzer
    from openembed.index.sparse import PRECISIONS
    from openembed.index.store import Store, check_absent

    analyzer(language)
    if precision not in PRECISIONS:
        raise ValueError(f"--precision {precision} is not known; allowed: {', '.join(PRECISIONS)}")
    check_absent(out)
    _check_file(corpus_file(corpus))
    if not model:
        model = [NANO if language == "en" else BM25]
        if model == [BM25]:
            logger.warning("%s reads English alone: words are indexed, no vectors; --model adds them", NANO)
    if model == [BM25]:
        given = {"--precision": precision if precision != "float32" else None, "--no-normalize": None if normalize else True}
        given |= {"--instruction": instruction, "--max-length": max_length, "--device": device, "--dtype": dtype}
        _refuse_unused(WORDS_ALONE, given)
    else:
        check_texts(corpus)
    encoding, encoded, report = out / "encoding", {}, {}
    coding = coding_of(bits, coded_from, vectors, encodings)
    options = {"instruction": instruction, "normalize": normalize, "max_length": max_length, "precision": precision}
    names = model if model != [BM25] else []
    encoders = [load_model(name, device, dtype) for name in names]
    infos = _described(names, encoders, coding=coding, **options)
    for info in infos:
        encoded[info.kind], report = encode_for(info, encoders.pop(0), corpus, encoding, restart)
    store = Store.create(out, read_documents(corpus), encoded, language=language, model=infos)
    shutil.rmtree(encoding, ignore_errors=True)
    report |= {"directory": str(out), "count": len(store), "language": language}
    report |= {"model": infos[0].name if infos else None, "models": {info.kind: info.name for info in infos}}
    report |= {"empty": store.empty}
    _say(as_json, report, f"{len(store):,} documents in {out}{pace(report)}{_without(store)}")


def search(
    directory: Directory,
    query: Annotated[str, typer.Argument(help="What to look for.")],
    mode: Annotated[
        str | None,
        typer.Option(
            help="dense, sparse, tokens, bm25 or hybrid (default: hybrid with a model; with --explain sparse, tokens, bm25)."
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="How many documents.")] = 10,
    where: Annotated[
        list[str] | None, typer.Option(help="Only documents with: field=value, field=a|b, field!=v, field>=2000; repeatable.")
    ] = None,
    filter: Annotated[str | None, typer.Option(help='Only documents with, as JSON: {"year": {"gte": 2000}}.')] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Look at every document of a large index too.")] = False,
    method: SearchMethod = "exact",
    explain: Annotated[
        bool, typer.Option("--explain", help="Show what makes each score: terms (sparse, bm25), or which tokens meet (tokens).")
    ] = False,
    rerank: Annotated[
        str | None, typer.Option(help="Model of any kind that orders what is found; it encodes these documents now.")
    ] = None,
    candidates: Annotated[int, typer.Option(help="Documents found for --rerank.")] = 100,
    model: OtherModel = None,
    task: Annotated[str | None, typer.Option(help="A task of the model's table.")] = None,
    instruction: Instruction = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: JsonFlag = False,
) -> None:
    """Search an index: dense, sparse, token vectors, BM25, or all it has fused by reciprocal rank.

    Scores: dense, the dot product (the cosine of normalized vectors); sparse, the sum of the products of the terms' weights;
    tokens, MaxSim; bm25, the BM25 score; hybrid, the sum of 1 / (60 + rank) over the rankings (0.0328 at most where there are
    two), which says nothing of how alike query and document are.
    """
    from openembed.index.encoding import kind_of
    from openembed.index.searching import check_k
    from openembed.index.store import Store
    from openembed.index.tokens.methods import EXACT, parse_method
    from openembed.steps.modes import Naming, check_explained, check_method, default_mode, explained, kinds_of, modes_of, ranked
    from openembed.steps.retrieve import encoded_queries

    check_k(k)
    store, by = Store(directory), parse_method(method, "--method")
    mode = mode or default_mode(modes_of(store.models), explain=explain)
    if explain:
        check_explained(mode, by)
    condition, kinds = _condition(where, filter), kinds_of(mode, store.models)
    prompted = {"task": task, "instruction": instruction}
    if mode == BM25:
        unused = {} if rerank else {f"--{name}": value for name, value in prompted.items()}
        _refuse_unused("words are searched here, by BM25", {"--model": model, **unused})
    if rerank:
        _check_rerank(k, candidates, explain)
    check_method(store, kinds, by)
    encoders = load_for(store, kinds, model, device, dtype) if mode != BM25 else []
    vectors = {kind_of(encoder): encoded_queries(store, encoder, [query], task, instruction) for encoder in encoders}
    count = candidates if rerank else k
    hits = ranked(store, mode, query, vectors, count, filter=condition, exact=exact or None, method=by)
    score = _score(mode, by)
    if rerank:
        hits, score = _reranked(store, query, list(hits), load_model(rerank, device, dtype), prompted)
        hits = dict(list(hits.items())[:k])
    rows = [(identifier, score, store.document(identifier)) for identifier, score in hits.items()]
    naming = Naming(encoders[0], encoders[0].query_prompt(task, instruction)) if encoders else Naming()
    terms = explained(store, mode, query, vectors, list(hits), naming) if explain else {}
    if not as_json:
        if rows:
            print_table(_table(rows, query, store, terms))
        else:
            sys.stdout.write("nothing found\n")
        return
    found = [
        {"rank": rank, "id": i, "score": score, "title": d.title, "text": d.text, "metadata": d.metadata}
        | ({"terms": terms[i]} if explain else {})
        for rank, (i, score, d) in enumerate(rows, 1)
    ]
    told = {} if by == EXACT else {"method": by.model_dump()}
    print_json({"query": query, "mode": mode, **told, "score": score, "hits": found})


def _check_rerank(k: int, candidates: int, explain: bool) -> None:
    if explain:
        raise ValueError("--explain tells the scores of the index's own search; leave --rerank out")
    if candidates < k:
        raise ValueError(f"--candidates {candidates} are fewer than the {k} documents asked for; give as many or more")


def _reranked(store: Store, query: str, found: list[str], encoder: Encoder, prompted: Mapping[str, Any]) -> tuple[Any, str]:
    """Returns what was found in order of the encoder's scores, and what these are."""
    from openembed.steps.rerank import rerank

    (hits,) = rerank(store, encoder, [query], [found], **prompted)
    return hits, SCORES[encoder.kind]


def add(
    directory: Directory,
    corpus: Corpus,
    replace: Annotated[bool, typer.Option("--replace", help="Replace documents whose id is already there.")] = False,
    model: OtherModel = None,
    device: Device = None,
    dtype: Dtype = None,
    restart: Restart = False,
    as_json: JsonFlag = False,
) -> None:
    """Add documents to an index without rebuilding it, all or nothing; run again after an interruption, encoding resumes."""
    import shutil

    from openembed.documents import corpus_file, read_documents
    from openembed.index.store import Store
    from openembed.progress import progress

    store = Store(directory)
    _check_file(corpus_file(corpus))
    if not store.models:
        _refuse_unused(WORDS_ALONE, {"--model": model})
    store.check_addable((document.id for document in read_documents(corpus)), replace=replace)
    encoding, vectors, report = directory / "adding", {}, {}
    encoders = load_for(store, list(store.models), model, device, dtype) if store.models else []
    for kind, info in store.models.items():
        vectors[kind], report = encode_for(info, encoders.pop(0), corpus, encoding, restart)
    with progress("add", None, "documents") as advance:
        count = store.add(read_documents(corpus), vectors=vectors, replace=replace, advance=advance)
    shutil.rmtree(encoding, ignore_errors=True)
    report |= {"added": count, "count": len(store), "empty": store.empty}
    _say(as_json, report, f"{count:,} added, {len(store):,} documents in {directory}{_without(store)}")


def update(
    directory: Directory,
    corpus: Corpus,
    model: OtherModel = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: JsonFlag = False,
) -> None:
    """Replace documents by id, all or nothing; only those whose title or text changed are encoded."""
    from openembed.documents import corpus_file, read_documents
    from openembed.index.store import Store

    store = Store(directory)
    _check_file(corpus_file(corpus))
    if not store.models:
        _refuse_unused(WORDS_ALONE, {"--model": model})
    documents = list(read_documents(corpus))
    count = store.update(documents, load_for(store, list(store.models), model, device, dtype) if store.models else None)
    _say(as_json, {"updated": count, "count": len(store)}, f"{count:,} updated, {len(store):,} documents in {directory}")


def delete(
    directory: Directory,
    ids: Annotated[list[str] | None, typer.Argument(help="Ids of documents to delete.")] = None,
    file: Annotated[Path | None, typer.Option("--ids", help="A file of ids, one a line.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Delete documents by id; all or nothing. `openembed compact` frees their space."""
    from openembed.files import read_lines
    from openembed.index.store import Store

    wanted = list(ids or [])
    if file is not None:
        wanted += [line.strip() for _, line in read_lines(file) if line.strip()]
    if not wanted:
        raise ValueError("no ids given; name them, or give a file of them with --ids FILE")
    store = Store(directory)
    count = store.delete(wanted)
    _say(as_json, {"deleted": count, "count": len(store)}, f"{count:,} deleted, {len(store):,} documents left")


def compact(
    directory: Directory,
    bits: Bits = None,
    coded_from: CodedFrom = None,
    vectors: Vectors = None,
    encodings: Encodings = None,
    as_json: JsonFlag = False,
) -> None:
    """Free the space of deleted documents, or code token vectors otherwise, now and in additions; no text is encoded again."""
    from openembed.index.store import Store

    store = Store(directory)
    present = store.models["tokens"].coding if "tokens" in store.models else None
    store.compact(coding_of(bits, coded_from, vectors, encodings, present))
    gone = "" if vectors is not False else "; coded token vectors are codes alone from now on, and scores are of these"
    _say(as_json, {"count": len(store)}, f"{len(store):,} documents in {directory}{gone}")


def _without(store: Store) -> str:
    """Returns how many documents have no vectors of a kind, for the end of a summary; empty where all have."""
    return "".join(f"; {count:,} without {kind} vectors" for kind, count in store.empty.items())


def _check_file(path: Path) -> None:
    """Raises ``FileNotFoundError`` before a model is loaded for nothing."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")


def _refuse_unused(why: str, options: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` for options about a model that were given where none is run."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{' and '.join(given)}: {why}, and no model is run; leave {'it' if len(given) == 1 else 'them'} out")


def _score(mode: str, method: Method) -> str:
    """Returns what the scores of a search are."""
    from openembed.index.tokens.methods import gives_maxsim

    if mode == "tokens" and not gives_maxsim(method):
        return f"{method.kind}'s estimate of {SCORES[mode]}"
    return SCORES[mode]


def _described(
    names: list[str], encoders: list[Encoder], *, precision: str, coding: TokenCoding | None, **options: Any
) -> list[ModelInfo]:
    """Returns what a new index records of its models; raises the ``ValueError`` that it would raise once they have encoded."""
    from openembed.encoded import require_kind
    from openembed.index.encoding import encoders_by_kind
    from openembed.index.fields import FIELDS
    from openembed.index.store import describe_model

    for encoder in encoders:
        require_kind(encoder, tuple(FIELDS), "an index", "evaluate it with `openembed evaluate`, or search it in Python")
    kinds = list(encoders_by_kind(encoders))
    if precision == "uint8" and "tokens" in kinds and "sparse" not in kinds:
        raise ValueError("--precision uint8 is for sparse weights; token vectors are kept in float32 or float16")
    if precision != "float32" and kinds == ["dense"]:
        raise ValueError(f"--precision {precision} is for sparse weights and token vectors; dense vectors are kept in float32")
    if coding is not None and "tokens" not in kinds:
        raise ValueError("--bits, --coded-from, --vectors and --encodings are of token vectors, and no --model gives any")
    kept = ["float32" if kind == "dense" or (kind, precision) == ("tokens", "uint8") else precision for kind in kinds]
    codings = [coding if kind == "tokens" else None for kind in kinds]
    described = zip(names, encoders, kept, codings, strict=True)
    return [describe_model(name, encoder, precision=own, coding=c, **options) for name, encoder, own, c in described]


def encode_for(info: ModelInfo, encoder: Any, corpus: Path, folder: Path, restart: bool) -> tuple[Any, dict[str, Any]]:
    """Encodes a file as a store's model has it, under ``folder``; returns vectors, and counts and seconds for a report.

    They are memory-mapped and unrounded: the store rounds to its ``precision``.
    """
    from openembed.bulk import BulkConfig

    normalize = info.normalize or info.kind != "dense"  # the head of another kind decides it
    config = BulkConfig(instruction=info.document_instruction, normalize=normalize, max_length=info.max_length)
    encoded, report = encode_to(encoder, str(corpus), folder / info.kind, config, restart)
    return encoded.vectors() if info.kind == "dense" else encoded.representations(), report


def _condition(where: list[str] | None, given: str | None) -> dict[str, Any] | None:
    """Returns the filter that ``--where`` and ``--filter`` ask for together."""
    import json

    from openembed.index.filters import parse_filter, parse_where

    parts = [parse_where(text) for text in where or []]
    if given is not None:
        try:
            parts.append(json.loads(given))
        except json.JSONDecodeError as error:
            raise ValueError(
                f'--filter: malformed JSON ({error.msg} at column {error.colno}); write {{"lang": "en"}}'
            ) from None
    if not parts:
        return None
    condition = parts[0] if len(parts) == 1 else {"and": parts}
    parse_filter(condition)
    return condition


def load_for(store: Store, kinds: list[str], model: str | None, device: str | None, dtype: str | None) -> list[Encoder]:
    """Returns the encoders of a store's vectors of these kinds: ``model`` in the place of the one of its kind, where given.

    Raises ``ValueError`` for kinds that the store does not have, and for a ``model`` of another kind or another than its own.
    """
    from openembed.encoded import CALLED
    from openembed.index.encoding import kind_of
    from openembed.steps.modes import modes_of

    if not store.models:
        raise ValueError(f"{store.directory}: was built without a model, so it serves BM25 only; use --mode bm25")
    missing = [kind for kind in kinds if kind not in store.models]
    if missing:
        *others, last = modes_of(store.models)
        raise ValueError(f"{store.directory}: has no vectors for --mode {missing[0]}; use {', '.join(others)} or {last}")
    given = None if model is None else load_model(model, device, dtype)
    if given is not None and kind_of(given) not in kinds:
        asked = " and ".join(CALLED[kind] for kind in kinds)
        advice = "give the model of these, or leave --model out"
        raise ValueError(f"--model {model} gives {CALLED[kind_of(given)]}; {asked} are asked for here: {advice}")
    encoders = []
    for kind in kinds:
        own = given is not None and kind_of(given) == kind
        encoders.append(given if own else load_model(store.models[kind].name, device, dtype))
        store.check_encoder(encoders[-1])
    return encoders


def _say(as_json: bool, report: dict[str, Any], line: str) -> None:
    if as_json:
        print_json(report)
    else:
        sys.stdout.write(line + "\n")


def _table(rows: list[tuple[str, float, Any]], query: str, store: Store, terms: Mapping[str, Any]) -> Any:
    """Returns a table of rank, score, id, title, the best part of the text with the query's words highlighted, metadata, and
    the terms that made the score, where a hit has ``terms``."""
    import json

    from rich.table import Table

    words = set(store.analyzer.terms(query))
    table = Table(box=None, pad_edge=False)
    for name, justify in (("rank", "right"), ("score", "right"), ("id", "left"), ("document", "left")):
        table.add_column(name, justify=justify)
    for rank, (identifier, score, document) in enumerate(rows, 1):
        title = _highlighted(document.title, words, store, width=None, style="bold")
        body = _highlighted(document.text, words, store, width=200, style="")
        if document.metadata:
            body.append("\n" + _printable(json.dumps(document.metadata, ensure_ascii=False))[:200], style="dim")
        if identifier in terms:
            body.append("\n" + _shares(terms[identifier]), style="cyan")
        both = title.append("\n").append_text(body) if document.title else body
        table.add_row(str(rank), f"{score:.4f}", _printable(identifier), both)
    return table


def _shares(terms: list[dict[str, Any]]) -> str:
    """Returns the terms that add most to a score, each with its part of it, and how many more there are.

    A token of the query comes with the document's token that it met, and their product.
    """
    shown = [
        f"{_printable(term['term'])} → {_printable(term['met'])} {term['score']:.2f}"
        if "met" in term
        else f"{_printable(term['term'])} {term['share']:.0%}"
        for term in terms[:TERMS]
    ]
    return "  ".join([*shown, *([f"+ {len(terms) - TERMS} more"] if len(terms) > TERMS else [])])


def _highlighted(text: str, words: Set[str], store: Store, *, width: int | None, style: str) -> Any:
    from rich.text import Text

    from openembed.index.highlight import matches, snippet

    spans = matches(text, words, store.analyzer)
    start, end = (0, len(text)) if width is None else snippet(text, spans, width)
    shown = Text("… " if start else "", style=style)
    offset = len(shown) - start
    shown.append(_printable(text[start:end]))
    for low, high, _ in spans:
        if start <= low and high <= end:
            shown.stylize("bold yellow", low + offset, high + offset)
    return shown.append(" …") if end < len(text) else shown


def _printable(text: str) -> str:
    """Returns ``text`` with control characters as spaces, so that no document can drive the terminal."""
    return "".join(" " if ord(c) < 32 or 127 <= ord(c) < 160 else c for c in text)
