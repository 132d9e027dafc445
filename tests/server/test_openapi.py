"""What /openapi.json says is what the server does: requests made from it, good and bad, by schemathesis."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

OPERATIONS = [
    "GET /v1/models", "GET /v1/models/{name}", "POST /v1/chat/completions", "POST /v1/completions",
    "POST /v1/responses", "GET /health", "GET /ready", "GET /version", "GET /metrics", "GET /server_info",
    "POST /tokenize", "POST /detokenize", "GET /tokenizer_info", "POST /v1/embeddings", "GET /engine",
    "GET /engine/stream", "POST /v1/messages", "POST /v1/messages/count_tokens",
]  # fmt: skip
ENDLESS = {"GET /engine/stream"}
NAMES = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
SEARCH = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def operations(server):
    schema = schemathesis.openapi.from_url(f"{server}/openapi.json")
    return {found.ok().label: found.ok() for found in schema.get_all_operations()}


def check(operation, mode):
    @given(case=operation.as_strategy(generation_mode=mode))
    @SEARCH
    def answers_as_described(case):
        response = case.call(timeout=60)
        case.validate_response(response, checks=CHECKS.get_by_names(NAMES))
        assert response.headers["x-request-id"]

    answers_as_described()


def test_no_operation_is_forgotten(operations):
    assert list(operations) == OPERATIONS


@pytest.mark.parametrize("label", [label for label in OPERATIONS if label not in ENDLESS])
def test_answers_are_as_described(operations, label):
    operation = operations[label]
    check(operation, GenerationMode.POSITIVE)
    if operation.body:
        check(operation, GenerationMode.NEGATIVE)


@pytest.mark.parametrize("label", OPERATIONS)
def test_other_methods_are_refused_as_described(operations, label, http):
    operation = operations[label]
    path = operation.path.replace("{name}", "quire-tiny")
    response = http.request("DELETE", path)
    assert response.status_code == 405
    assert set(response.headers["allow"].split(", ")) <= {"GET", "POST", "HEAD"}
    case = operation.Case(method="DELETE", path_parameters={"name": "quire-tiny"} if "{name}" in operation.path else {})
    case.validate_response(response, checks=CHECKS.get_by_names(["response_schema_conformance"]))


def test_a_description_that_is_wrong_is_noticed(operations, http):
    """The checks above do look: an answer held against another operation's description fails."""
    operation = operations["POST /v1/messages"]
    answer = http.post("/v1/completions", json={"prompt": 1})
    assert answer.status_code == 400
    with pytest.raises(BaseExceptionGroup, match="distinct failure"):
        operation.Case(body={}).validate_response(answer, checks=CHECKS.get_by_names(NAMES))
