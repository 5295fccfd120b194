"""Room and numbers of token vectors at their ends: what a search takes, what files hold, what a half-precision number is."""

import numpy as np
import pytest

from openembed.index import exact
from openembed.index.tokens import codec, xtr
from openembed.index.tokens.coding import Panel
from openembed.index.tokens.exact import TokenMatrix
from openembed.index.tokens.files import TokenSettings, TokenWriter
from openembed.index.tokens.native import token_library
from openembed.token_vectors import TokenVectors

compiled = pytest.mark.skipif(token_library() is None, reason="no compiler")


def one_token_each(values_TD):
    return TokenVectors(values_TD, np.arange(len(values_TD) + 1, dtype=np.int64))


@compiled
@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("count", [1, 100, 7_999])
def test_retrieving_takes_no_more_room_than_there_are_tokens(monkeypatch, equal, count):
    """Equal tokens are candidates all of them, for which a lane's first room is too small."""
    values_TD = np.random.default_rng(0).standard_normal((8_000, 16)).astype(np.float32)
    values_TD = np.broadcast_to(values_TD[:1], values_TD.shape).copy() if equal else values_TD
    query, rooms, scan = TokenVectors.from_list([values_TD[:3]]), [], xtr._scan

    def recorded(*arguments):
        rooms.append(arguments[-1])
        return scan(*arguments)

    monkeypatch.setattr(xtr, "_scan", recorded)
    found = xtr.retrieve(TokenMatrix.of(one_token_each(values_TD)), np.ones(8_000, dtype=bool), Panel(query), count)
    assert max(rooms) <= 8_000 * 5 // 4 + 64
    assert (len(rooms) > 1) == (equal and count < 7_999)
    products = query.values_TD.astype(np.float64) @ values_TD.astype(np.float64).T
    for lane in range(3):
        mine = np.sort(found.products[found.lanes == lane])
        np.testing.assert_allclose(mine, np.sort(products[lane])[-count:], rtol=1e-6, atol=1e-6)


def test_more_tokens_than_can_be_coded_are_refused_when_they_are_added(monkeypatch, tmp_path):
    monkeypatch.setattr(codec, "MOST", 10)
    tokens = one_token_each(np.eye(6, 4, dtype=np.float32))
    writer = TokenWriter(tmp_path / "coded", 4)
    writer.add(tokens)
    with pytest.raises(ValueError, match="12 tokens to code for one segment; at most 10 can be"):
        writer.add(tokens)
    plain = TokenWriter(tmp_path / "plain", 4, TokenSettings(bits=0))
    plain.add(tokens)
    plain.add(tokens)
    assert plain.close().tokens == 12


def test_more_tokens_than_their_places_can_number_are_not_arranged(monkeypatch):
    values_TD = np.eye(6, 4, dtype=np.float32)
    coder = codec.Codec.train(values_TD, 2, 2)
    offsets_N1, codes_T = np.arange(7), np.zeros(6, dtype=np.int32)
    assert len(codec.arranged(coder, offsets_N1, codes_T, coder.pack(values_TD, codes_T))) == 6
    monkeypatch.setattr(codec, "MOST", 5)
    with pytest.raises(ValueError, match="6 tokens to code"):
        codec.arranged(coder, offsets_N1, codes_T, coder.pack(values_TD, codes_T))
    with pytest.raises(ValueError, match="6 tokens to code"):
        codec.encode_tokens(coder, values_TD, offsets_N1)


def test_every_half_precision_number_is_read_as_it_is():
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    prepared = exact.prepared(one_token_each(halves[:, None]))
    scores = prepared.scores(TokenVectors.from_list([np.ones((1, 1), np.float32)]), np.arange(len(halves)))
    np.testing.assert_array_equal(scores, halves.astype(np.float32))
