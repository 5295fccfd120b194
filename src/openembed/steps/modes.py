"""The ways a store is searched that have a name: by the vectors of a kind, by words, or by all it has, fused by rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from openembed.encoded import Encoded
from openembed.index.encoding import VectorToken, term_names, vector_tokens
from openembed.index.manifest import Kind
from openembed.index.searching import Condition, Hits, check_k
from openembed.index.tokens.methods import EXACT, Exact, Method, gives_maxsim
from openembed.steps.fuse import fused_depth, reciprocal_rank
from openembed.token_vectors import TokenVectors

if TYPE_CHECKING:
    from openembed.index.store import Store

KINDS: tuple[Kind, ...] = get_args(Kind)
MODES = (*KINDS, "bm25", "hybrid")
EXPLAINED = ("sparse", "tokens", "bm25")
"""Modes whose scores are sums over terms or tokens, the best first."""


def modes_of(kinds: Iterable[str]) -> list[str]:
    """Returns the modes of a store that has vectors of these kinds, the best of them last."""
    held = [kind for kind in KINDS if kind in set(kinds)]
    return [*held, "bm25", "hybrid"] if held else ["bm25"]


def default_mode(modes: Sequence[str], *, explain: bool = False) -> str:
    """Returns the mode of a search that names none: the best of a store's, with ``explain`` of those that can be explained."""
    return next(mode for mode in EXPLAINED if mode in modes) if explain else modes[-1]


def kinds_of(mode: str, kinds: Iterable[str]) -> list[Kind]:
    """Returns the kinds of vectors that a mode asks of a store that has these; ``ValueError`` for an unknown mode."""
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is not known; allowed: {', '.join(MODES)}")
    held = set(kinds)
    return [kind for kind in KINDS if kind in (held if mode == "hybrid" else {mode})]


def ranked(
    store: Store,
    mode: str,
    query: str,
    vectors: Mapping[Kind, Encoded],
    k: int,
    *,
    filter: Condition = None,
    exact: bool | None = None,
    method: Method = EXACT,
) -> Hits:
    """Returns the k best documents, best first. ``vectors``: the query's, of each kind that the mode asks. ``method``: how
    token vectors are searched.

    ``hybrid`` fuses the rankings of all ``vectors`` and of the words by reciprocal rank. Raises what the store's searches do.
    """
    check_k(k)
    depth = fused_depth(k) if mode == "hybrid" else k
    runs: list[Hits] = []
    if "dense" in vectors:
        options = {} if exact is None else {"exact": exact}
        runs += store.dense(vectors["dense"], depth, filter=filter, **options)
    if "sparse" in vectors:
        runs += store.sparse(vectors["sparse"], depth, filter=filter)
    if "tokens" in vectors:
        runs += store.tokens(vectors["tokens"], depth, filter=filter, method=method)
    if mode in ("bm25", "hybrid"):
        runs += store.bm25([query], depth, filter=filter)
    if mode != "hybrid":
        return runs[0]
    fused = reciprocal_rank([{query: hits} for hits in runs])[query]
    return dict(list(fused.items())[:k])


def check_method(store: Store, kinds: Sequence[Kind], method: Method) -> None:
    """Raises ``ValueError`` where a method of searching token vectors has none to search, or the store cannot serve it."""
    if isinstance(method, Exact):
        return
    if "tokens" not in kinds:
        raise ValueError(f"method {method.kind} searches token vectors, and none are searched here; leave it out")
    store.check_method(method)


def check_explained(mode: str, method: Method = EXACT) -> None:
    """Raises ``ValueError`` for a mode whose scores are no sums over terms or tokens, and a method whose are not MaxSim."""
    if mode not in EXPLAINED:
        raise ValueError(
            f"a score of mode {mode!r} is no sum over terms or tokens; allowed with explain: {', '.join(EXPLAINED)}"
        )
    if not gives_maxsim(method):
        raise ValueError(f"what is explained is MaxSim, and method {method.kind} gives scores of its own; add rescored to it")


class Naming(NamedTuple):
    """What names the parts of a score: the mode's encoder, and the literal prompt under which it encoded the query."""

    encoder: Any = None
    prompt: str = ""


def explained(
    store: Store,
    mode: str,
    query: str,
    vectors: Mapping[Kind, Encoded],
    identifiers: Sequence[str],
    naming: Naming = Naming(),
) -> dict[str, list[dict[str, Any]]]:
    """Returns for each document what makes its score, as reports give it, what adds most first.

    By terms (sparse, bm25) each has ``term``, ``score``, its ``share`` of the document's score, and the weights in ``query``
    and ``document`` whose product the score is. By tokens each token of the query has, beside ``term``, ``score`` and
    ``share``, the document's token that it ``met``, the positions of both among their token vectors, which stand for tokens
    that cannot be named, and as ``met_span`` the (start, end) of the one met in the document's ``full_text``, None where it
    is not of it. Raises what ``check_explained`` and ``Store.explain`` do.
    """
    check_explained(mode)
    if mode == "tokens":
        return _met(store, query, vectors["tokens"], identifiers, naming)
    found = store.explain(vectors["sparse"] if mode == "sparse" else query, identifiers, term_names(naming.encoder))
    rows = {}
    for identifier, parts in found.items():
        whole = sum(part.score for part in parts)
        rows[identifier] = [
            {"term": p.token, "score": p.score, "share": p.score / whole, "query": p.query, "document": p.document}
            for p in parts
            if p.score > 0
        ]
    return rows


def _met(
    store: Store, query: str, vectors: TokenVectors, identifiers: Sequence[str], naming: Naming
) -> dict[str, list[dict[str, Any]]]:
    encoder, model = naming.encoder, store.models["tokens"]
    (own,) = vector_tokens(encoder, [query], naming.prompt, model.max_length, queries=True)
    prompt = encoder.document_prompt(None, model.document_instruction) if hasattr(encoder, "document_prompt") else ""
    texts = [store.document(identifier).full_text for identifier in identifiers]
    tokens = vector_tokens(encoder, texts, prompt, model.max_length, queries=False)
    rows = {}
    for (identifier, parts), theirs in zip(store.explain(vectors, identifiers).items(), tokens, strict=True):
        whole = sum(part.score for part in parts)
        met = [_token(theirs, part.document, part.tokens) for part in parts]
        rows[identifier] = [
            {
                "term": _token(own, part.query, vectors.lengths_N[0]).name,
                "met": token.name,
                "score": part.score,
                "share": part.score / whole if whole else 0.0,
                "position": part.query,
                "met_position": part.document,
                "met_span": token.span,
            }
            for part, token in zip(parts, met, strict=True)
        ]
    return rows


def _token(tokens: list[VectorToken] | None, position: int, count: int) -> VectorToken:
    """A vector's token; its position for a name where there are no tokens, or not as many as vectors, pooled since then."""
    return VectorToken(str(position), None) if tokens is None or len(tokens) != count else tokens[position]
