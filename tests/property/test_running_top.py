"""The running top k equals a full sort, whatever the blocks, ties and limits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_paths import PATHS, forced

from openembed.index.dense import top_documents


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 5),
    st.integers(1, 900),
    st.integers(1, 40),
    st.sampled_from([16, 64, 4096]),
    st.sampled_from(PATHS),
    st.booleans(),
    st.booleans(),
)
def test_equals_a_full_sort(seed, queries, documents, k, block, path, ties, limited):
    random = np.random.default_rng(seed)
    draw = (lambda shape: random.integers(-2, 3, shape)) if ties else random.standard_normal
    queries_QD, documents_ND = draw((queries, 4)).astype(np.float32), draw((documents, 4)).astype(np.float32)
    scores_QN = (documents_ND[None].astype(np.float64) * queries_QD[:, None]).sum(-1).astype(np.float32)
    limit_Q = np.median(scores_QN, axis=1) + np.float32(1e-4) if limited else None
    allowed_QN = scores_QN < limit_Q[:, None] if limited else np.ones_like(scores_QN, dtype=bool)
    with forced(path, block):
        found = top_documents(queries_QD, documents_ND, k, limit_Q)
    for row in range(queries):
        ranked = [n for n in np.argsort(-scores_QN[row], kind="stable") if allowed_QN[row, n]][:k]
        kept = found.documents_QK[row] >= 0
        assert found.documents_QK[row][kept].tolist() == ranked
        assert found.scores_QK[row][kept].tolist() == scores_QN[row, ranked].tolist()
        assert found.above_Q[row] == (~allowed_QN[row]).sum()


def test_reads_a_memory_mapped_file_in_blocks(tmp_path):
    values_ND = np.random.default_rng(0).standard_normal((1000, 8)).astype("<f4")
    np.save(tmp_path / "vectors.npy", values_ND)
    mapped_ND = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    with forced("codes", 96):
        plain, mapped = (top_documents(values_ND[:20], documents, 10) for documents in (values_ND, mapped_ND))
    np.testing.assert_array_equal(plain.documents_QK, mapped.documents_QK)
    np.testing.assert_array_equal(plain.scores_QK, mapped.scores_QK)
    best_Q = (values_ND[:20] @ values_ND.T).argmax(axis=1)
    assert plain.documents_QK[:, 0].tolist() == best_Q.tolist()


@pytest.mark.parametrize("k", [0, 5])
def test_no_documents_give_no_results(k):
    found = top_documents(np.ones((2, 3), np.float32), np.empty((0, 3), np.float32), k)
    assert found.documents_QK.shape == (2, 0)
