import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from openembed.data.batch import BatchConfig, RowSource, allowed_mask, collate, text_key
from openembed.data.margin import MarginConfig
from openembed.records import Document, Example, Query

SOURCES = {
    "open": RowSource("open", query_prompt="ask: ", in_batch=True),
    "closed": RowSource("closed", document_prompt="doc: ", in_batch=False),
    "other": RowSource("other", in_batch=True),
}
TEXTS = ["a", "b", "c", "d", "A ", "e f", "e  F", "g"]
documents = st.builds(Document, st.sampled_from(["", "1", "2", "3", "4"]), st.sampled_from(TEXTS))


@st.composite
def example(draw):
    positives = tuple(draw(st.lists(documents, min_size=1, max_size=3)))
    negatives = tuple(draw(st.lists(documents, max_size=3)))
    scored = draw(st.booleans())
    score = st.sampled_from([-0.5, 0.1, 0.5, 0.8, 0.9])
    return Example(
        Query("q", draw(st.sampled_from(TEXTS))),
        positives,
        negatives,
        draw(st.sampled_from(sorted(SOURCES))),
        tuple(draw(score) for _ in positives) if scored else (),
        tuple(draw(score) for _ in negatives) if scored else (),
    )


def loop_mask(batch, rows, in_batch, margin):
    """Row by row, column by column, document by document, from the examples alone."""
    texts = [(batch.prompts[u], batch.texts[u]) for u in batch.document_N]
    positive_columns = {texts.index((SOURCES[r.source].document_prompt, d.full_text)) for r in rows for d in r.positives}
    column_ids = [
        {
            (r.source, d.id)
            for r in rows
            for d in (*r.positives, *r.negatives)
            if d.id and (SOURCES[r.source].document_prompt, d.full_text) == text
        }
        for text in texts
    ]
    allowed = np.zeros((len(rows), len(texts)), dtype=bool)
    hard = allowed.copy()
    for q, row in enumerate(rows):
        source = SOURCES[row.source]
        twins = [r for r in rows if text_key(r.query.text) == text_key(row.query.text)]
        known_texts = {text_key(d.full_text) for r in twins for d in r.positives} | {text_key(row.query.text)}
        known_ids = {(r.source, d.id) for r in twins for d in r.positives if d.id}
        if margin and row.positive_scores:
            ceiling = margin.ceiling(np.array([min(row.positive_scores)]))[0]
            for document, score in zip(row.negatives, row.negative_scores, strict=True):
                if score >= ceiling:
                    known_texts.add(text_key(document.full_text))
        own_positives = {(source.document_prompt, d.full_text) for d in row.positives}
        own_negatives = {(source.document_prompt, d.full_text) for d in row.negatives}
        for n, text in enumerate(texts):
            open_column = in_batch == "all" or (in_batch == "positives" and n in positive_columns)
            is_hard = text in own_negatives
            candidate = is_hard or (source.in_batch and open_column)
            refused = text_key(text[1]) in known_texts or bool(column_ids[n] & known_ids) or text in own_positives
            allowed[q, n] = candidate and not refused
            hard[q, n] = allowed[q, n] and is_hard
    return allowed, hard


@given(
    st.lists(example(), min_size=1, max_size=5),
    st.sampled_from(["all", "positives", "none"]),
    st.sampled_from([None, MarginConfig(), MarginConfig(kind="margin", value=0.1)]),
)
@settings(max_examples=300, deadline=None)
def test_mask_equals_triple_loop(rows, in_batch, margin):
    batch = collate(rows, SOURCES, BatchConfig(positives=9, negatives=9), np.random.default_rng(0))
    found = allowed_mask(batch, in_batch, margin)
    allowed, hard = loop_mask(batch, rows, in_batch, margin)
    np.testing.assert_array_equal(found.allowed_QN, allowed)
    np.testing.assert_array_equal(found.hard_QN, hard)
    assert not (found.allowed_QN & found.positives_QN).any()
    assert not (found.allowed_QN & found.masked_QN).any()


@given(st.lists(example(), min_size=2, max_size=6))
@settings(max_examples=100, deadline=None)
def test_without_in_batch_no_row_sees_another_rows_documents(rows):
    batch = collate(rows, SOURCES, BatchConfig(positives=9, negatives=9), np.random.default_rng(0))
    for in_batch, closed in (("none", range(len(rows))), ("all", np.flatnonzero(~batch.in_batch_Q))):
        allowed_QN = allowed_mask(batch, in_batch).allowed_QN
        for row in closed:
            own = {document.full_text for document in rows[row].negatives}
            assert {batch.texts[batch.document_N[n]] for n in np.flatnonzero(allowed_QN[row])} <= own


@given(st.lists(example(), min_size=1, max_size=6), st.integers(1, 2), st.integers(0, 2))
@settings(max_examples=100, deadline=None)
def test_batch_shape(rows, positives, negatives):
    config = BatchConfig(positives=positives, negatives=negatives)
    batch = collate(rows, SOURCES, config, np.random.default_rng(1))
    assert len(set(zip(batch.prompts, batch.texts, strict=True))) == len(batch.texts)
    assert len(set(batch.document_N.tolist())) == batch.columns
    for row, given_example in enumerate(rows):
        mine = batch.negative_M2[batch.negative_M2[:, 0] == row]
        assert len(mine) == min(negatives, len(given_example.negatives))
        texts = {batch.texts[batch.document_N[column]] for column in mine[:, 1]}
        assert texts <= {document.full_text for document in given_example.negatives}
        assert batch.texts[batch.query_Q[row]] == given_example.query.text
        assert batch.prompts[batch.query_Q[row]] == SOURCES[given_example.source].query_prompt


def test_positives_left_out_of_the_batch_are_still_never_negatives():
    known = Example(Query("1", "q"), (Document("1", "a"), Document("2", "b")), (), "open")
    other = Example(Query("2", "r"), (Document("2", "b"),), (Document("3", "c"),), "open")
    for seed in range(5):
        batch = collate([known, other], SOURCES, BatchConfig(positives=1), np.random.default_rng(seed))
        texts = [batch.texts[u] for u in batch.document_N]
        found = allowed_mask(batch)
        assert not found.allowed_QN[0, texts.index("b")]
        assert found.allowed_QN[0, texts.index("c")]
        assert found.masked_QN[0].sum() == (1 if "a" in texts else 0)
