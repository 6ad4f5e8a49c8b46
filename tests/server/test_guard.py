"""Who may ask, how much may be sent, and what happens while the model loads or the server ends."""

import pytest
from fake_engine import FakeEngine
from server_cases import CHAT, HELLO, ask, service_of

from hybrid.server.service import Service
from hybrid.server.settings import ServerSettings

BODY = {"messages": HELLO}


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": "Bearer wrong"}, {"authorization": "Basic ß".encode()}, {"x-api-key": "secret2"}],
)
def test_without_the_key_nothing_is_answered(headers):
    engine = FakeEngine()
    answer = ask("POST", CHAT, service_of(engine, api_key="secret"), json=BODY, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert not engine.requests


@pytest.mark.parametrize("headers", [{"authorization": "Bearer secret"}, {"x-api-key": "secret"}])
def test_with_the_key(headers):
    assert ask("POST", CHAT, service_of(api_key="secret"), json=BODY, headers=headers).status_code == 200


@pytest.mark.parametrize(("path", "status"), [("/health", 200), ("/metrics", 401), ("/props", 401), ("/nix", 401)])
def test_only_health_needs_no_key(path, status):
    assert ask("GET", path, service_of(api_key="secret")).status_code == status


def test_anthropics_paths_have_anthropics_errors():
    answer = ask("POST", "/v1/messages", service_of(api_key="secret"), json={})
    assert (answer.status_code, answer.json()["type"]) == (401, "error")
    assert answer.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize(("size", "status"), [(2000, 200), (2001, 413)])
def test_a_body_is_counted(size, status):
    text = b'{"messages": [{"role": "user", "content": "Hello"}], "user": "%s"}'
    content = text % (b"x" * (size - len(text) + 2))
    assert len(content) == size
    for given in (content, iter([content[:1000], content[1000:]])):  # with its length, and in chunks
        asked = ask("POST", CHAT, service_of(max_body=2000), content=_async(given))
        assert asked.status_code == status


def _async(given):
    async def chunks():
        for chunk in given:
            yield chunk

    return given if isinstance(given, bytes) else chunks()


def test_while_the_model_loads():
    service = Service(ServerSettings())
    for method, path in (("GET", "/health"), ("POST", CHAT), ("GET", "/metrics")):
        answer = ask(method, path, service, json=BODY)
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "unavailable_error")
        assert "loading" in answer.json()["error"]["message"]


def test_while_the_server_ends():
    service = service_of()
    service.stopping = True
    answer = ask("POST", CHAT, service, json=BODY)
    assert (answer.status_code, "retry-after" in answer.headers) == (503, True)


def test_too_many_at_once():
    service = service_of(max_connections=3)
    service.active = 3
    assert ask("POST", CHAT, service, json=BODY).status_code == 503
    assert ask("GET", "/health", service).status_code == 200
    assert service.active == 3


def test_web_pages_may_not_ask():
    answer = ask("POST", CHAT, json=BODY, headers={"origin": "https://evil.example"})
    assert (answer.status_code, "access-control-allow-origin" in answer.headers) == (403, False)


def test_web_pages_that_may():
    page = "https://page.example"
    service = service_of(cors=(page,), api_key="secret")
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    preflight = ask("OPTIONS", CHAT, service, headers={"origin": page} | asked)
    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, page)
    headers = {"origin": page, "authorization": "Bearer secret"}
    answer = ask("POST", CHAT, service, json=BODY, headers=headers)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, page)
    refused = ask("POST", CHAT, service, json=BODY, headers={"origin": page})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, page)
    assert ask("POST", CHAT, service, json=BODY, headers=headers | {"origin": "https://e.example"}).status_code == 403


@pytest.mark.parametrize(("method", "path", "status"), [("GET", CHAT, 405), ("POST", "/nix", 404), ("PUT", "/x", 404)])
def test_what_there_is_not(method, path, status):
    answer = ask(method, path)
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")
