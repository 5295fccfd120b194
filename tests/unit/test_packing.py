import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openembed.packing import TokenRows, micro_batches, pack

lengths_lists = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@given(lengths_lists, st.integers(1, 128), st.integers(1, 6) | st.none())
def test_micro_batches_hold_every_text_once_within_the_budget(lengths, budget, most):
    groups = micro_batches(np.array(lengths), budget, most)
    assert sorted(np.concatenate(groups)) == list(range(len(lengths)))
    for group in groups:
        total = sum(lengths[i] for i in group)
        assert total <= budget or len(group) == 1
        assert most is None or len(group) <= most
    ordered = [lengths[i] for i in np.concatenate(groups)]
    assert ordered == sorted(lengths, reverse=True)


@given(lengths_lists)
def test_packed_stream_is_the_rows_end_to_end(lengths):
    ids = [np.arange(n, dtype=np.int32) + 100 * i for i, n in enumerate(lengths)]
    starts = np.array([n // 2 for n in lengths], dtype=np.int32)
    packed = pack(TokenRows(ids, starts))
    offsets = packed.layout.offsets_B1.tolist()
    for i, row in enumerate(ids):
        piece = slice(offsets[i], offsets[i + 1])
        assert packed.ids_T[piece].tolist() == row.tolist()
        assert packed.positions_T[piece].tolist() == list(range(len(row)))
        assert packed.pool_mask_T[piece].sum() == len(row) - starts[i]
    covered = [p for run in packed.layout.runs for p in range(run.start, run.stop)]
    assert covered == list(range(offsets[-1]))


def test_packing_nothing_or_an_empty_row_is_refused():
    rows = TokenRows([np.array([], dtype=np.int32)], np.zeros(1, dtype=np.int32))
    with pytest.raises(ValueError, match="no tokens"):
        pack(rows)
    with pytest.raises(ValueError, match="no rows"):
        pack(rows, [])
    with pytest.raises(ValueError, match="token_budget"):
        micro_batches(np.array([1]), 0)
