"""Public suites, unmodified: `llm-comply` for the three APIs, `schemathesis` for the OpenAPI description."""

from pathlib import Path

import pytest
from fake_engine import FakeEngine
from server_cases import running, service_of

from hybrid.server.app import create_app

# What the suite asks for and this server does not do: pictures; and its one model need not be named.
NOT_DONE = {
    "openai_chat": {"chat-image-input", "chat-error-handling"},
    "openresponses": {"image-input", "error-handling"},
    "anthropic": {"anth-image-input"},
}


@pytest.mark.parametrize("spec", NOT_DONE)
def test_llm_comply(spec):
    comply = pytest.importorskip("llm_comply", reason="llm-comply is not installed: pip install -e .[clients]")
    from llm_comply.config import ComplianceConfig
    from llm_comply.runner import TestRunner
    from llm_comply.schema import SpecLoader
    from llm_comply.tests.anthropic import ANTHROPIC_TESTS
    from llm_comply.tests.open_responses import OPEN_RESPONSES_TESTS
    from llm_comply.tests.openai_chat import OPENAI_CHAT_TESTS

    suites = {"openai_chat": OPENAI_CHAT_TESTS, "openresponses": OPEN_RESPONSES_TESTS, "anthropic": ANTHROPIC_TESTS}
    schemas = SpecLoader(str(Path(comply.__file__).parent / "specs" / f"{spec}.json"))
    with running(service_of(FakeEngine())) as url:
        config = ComplianceConfig(base_url=f"{url}/v1", api_key="any", model="any")
        found = TestRunner(config, suites[spec], schemas).run_all().results
    failed = {result.id: result.errors for result in found if result.status.name == "FAILED"}
    assert set(failed) == NOT_DONE[spec], failed
    assert sum(result.status.name == "PASSED" for result in found) >= 6


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_schemathesis(mode):
    """Requests that the description allows, and such as it does not."""
    schemathesis = pytest.importorskip(
        "schemathesis", reason="schemathesis is not installed: pip install -e .[clients]"
    )
    from hypothesis import HealthCheck, given, settings
    from schemathesis import checks
    from schemathesis.specs.openapi import checks as openapi

    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(service_of(FakeEngine(""))))
    wanted = [
        checks.not_a_server_error,
        openapi.status_code_conformance,
        openapi.content_type_conformance,
        openapi.response_schema_conformance,
        openapi.negative_data_rejection,
        openapi.unsupported_method,
    ]
    asked = set()
    for operation in (each.ok() for each in schema.get_all_operations()):
        if mode == "NEGATIVE" and operation.method == "get":  # nothing of these can be wrong
            continue

        @settings(
            max_examples=15, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
        )
        @given(case=operation.as_strategy(schemathesis.GenerationMode[mode]))
        def ask(case):
            case.call_and_validate(checks=wanted)

        ask()
        asked.add((operation.method.upper(), operation.path))
    assert {("POST", "/v1/chat/completions"), ("POST", "/v1/messages")} <= asked
    assert len(asked) == (13 if mode == "POSITIVE" else 7)
