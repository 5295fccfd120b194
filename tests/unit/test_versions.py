"""What is kept of weights is made anew when they change, whatever changed them."""

import numpy as np
import pytest
import torch
from vocabulary import SENTENCES, sparse_encoder

from openembed.packing import pack
from openembed.versions import version


@pytest.mark.parametrize("fused", [False, True])
def test_steps_of_any_optimizer_are_seen(fused):
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    weight.grad = torch.ones(4)
    before = version(weight)
    assert version(weight) == before
    optimizer.step()
    assert version(weight) != before


def test_changes_in_place_and_replacements_are_seen():
    weight = torch.ones(4)
    before = version(weight)
    weight.add_(1)
    assert version(weight) != before
    assert version(weight) != version(weight.clone())
    with torch.inference_mode():
        version(torch.ones(2))  # such tensors count nothing


def test_an_encoder_follows_a_fused_step_between_two_encodes(tmp_path):
    encoder = sparse_encoder(tmp_path, {"transform": "none"})
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.05, fused=True)
    encoder.train()(pack(encoder.tokenize(SENTENCES))).sum().backward()
    encoder.eval()
    before, fingerprint = encoder.encode_documents(SENTENCES).toarray(), encoder.fingerprint
    optimizer.step()
    after = encoder.encode_documents(SENTENCES).toarray()
    assert np.abs(after - before).max() > 0.01
    assert encoder.fingerprint != fingerprint
    fresh = sparse_encoder(tmp_path, {"transform": "none"})
    fresh.load_state_dict(encoder.state_dict())
    np.testing.assert_allclose(after, fresh.eval().encode_documents(SENTENCES).toarray(), atol=1e-5)
