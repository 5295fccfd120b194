"""schemathesis: every path answers generated requests, good and bad, as the API's description says."""

import os

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from server_setup import make_kinds, served
from tiny_training import tiny_sparse_encoder
from token_models import token_encoder

from openembed.server.settings import Limits, Settings

EXAMPLES = 300 if os.environ.get("OPENEMBED_SLOW") == "1" else 25
OPERATIONS = [
    "POST /v1/embeddings",
    "POST /embed",
    "POST /embed_sparse",
    "POST /v1/multi-vector",
    "POST /pooling",
    "POST /v1/rerank",
    "POST /v2/rerank",
    "POST /rerank",
    "POST /v1/search",
    "POST /v1/contributions",
    "GET /v1/indexes",
    "POST /v1/documents",
    "DELETE /v1/documents",
    "GET /v1/documents/{identifier}",
    "GET /v1/models",
    "GET /v1/models/{name}",
    "GET /health",
    "GET /metrics",
]


@pytest.fixture(scope="module")
def operations(make_encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("schema")
    sparse = tiny_sparse_encoder(folder / "words", query_head={"kind": "idf_lookup"})
    encoders = {"dense": make_encoder(), "sparse": sparse, "tokens": token_encoder(folder / "pieces")}
    make_kinds(folder / "animals", encoders)
    settings_ = Settings(limits=Limits(body_bytes=262_144), writable=True)
    with served([str(folder / "animals")], encoders, settings_, token_budget=1024) as (app, _gate, catalog):
        found = [result.ok() for result in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations()]
        yield {operation.label: operation for operation in found}
        assert catalog.healthy


def test_all_operations_are_tried(operations):
    assert sorted(operations) == sorted(OPERATIONS)


SEMANTIC = {
    "conflicting_parameters",
    "duplicate_id",
    "invalid_filter",
    "instruction_too_long",
    "method_not_available",
    "not_explained",
    "context_length_exceeded",
    "too_many_dimensions",
    "unknown_task",
    "unknown_token",
}
"""Codes of refusals that no schema can express."""


@pytest.mark.parametrize(
    ("label", "mode"),
    [(label, GenerationMode.POSITIVE) for label in OPERATIONS]
    + [(label, GenerationMode.NEGATIVE) for label in OPERATIONS if not label.startswith("GET")],
    ids=str,
)
def test_answers_are_as_described(operations, label, mode):
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
        derandomize=True,
        database=None,
    )
    @given(case=operations[label].as_strategy(generation_mode=mode))
    def run(case):
        response = case.call()
        case.validate_response(response, excluded_checks=[positive_data_acceptance])
        if mode == GenerationMode.POSITIVE and response.status_code == 400:
            assert response.json()["error"]["code"] in SEMANTIC, response.text

    run()
