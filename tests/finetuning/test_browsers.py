"""What a browser is told, so that a page of others gets nothing out of the service or into its pages.

Foreign hosts and origins are refused in ``test_errors``.
"""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from service_process import ServiceProcess

from comps.cores.docs_page import DOCS_POLICY, docs_page

PAGE = b"<script>fetch('/v1/files')</script>"


def policy(header: str) -> dict[str, str]:
    """The directives of a Content-Security-Policy."""
    parts = (part.strip().partition(" ") for part in header.split(";"))
    return {name: sources for name, _, sources in parts}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 200), ("GET", "/metrics", 200), ("GET", "/openapi.json", 200),
        ("GET", "/v1/files", 200), ("HEAD", "/health", 200), ("GET", "/nothing", 404),
        ("PUT", "/health", 405), ("POST", "/v1/models", 422),
    ],
)  # fmt: skip
def test_every_answer_may_load_nothing_and_be_framed_by_nobody(
    server: ServiceProcess, method: str, path: str, status: int
) -> None:
    answer = server.http.request(method, path)
    assert answer.status_code == status
    assert policy(answer.headers["content-security-policy"]) == {
        "default-src": "'none'",
        "frame-ancestors": "'none'",
    }
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"


def test_refusals_at_the_door_have_the_same_headers(server: ServiceProcess) -> None:
    for headers in (
        {"host": "evil.example"},
        {"origin": "https://evil.example"},
        {"content-encoding": "gzip"},
    ):
        answer = server.http.post("/v1/models", content=b"{}", headers=headers)
        assert answer.status_code in (400, 403, 415)
        assert policy(answer.headers["content-security-policy"])["default-src"] == "'none'"


def test_what_was_uploaded_is_downloaded_and_never_shown(server: ServiceProcess) -> None:
    file = server.openai.files.create(file=("page.html", PAGE), purpose="user_data")
    answer = server.http.get(f"/v1/files/{file.id}/content")
    assert answer.content == PAGE
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"].startswith("attachment")
    assert answer.headers["x-content-type-options"] == "nosniff"


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the text of its style sheets."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.styles: list[str] = []
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside == "style":
            self.styles.append(data)
            self._inside = ""


def test_the_page_of_the_routes_needs_no_script_and_nobody_else(server: ServiceProcess) -> None:
    assert server.http.get("/").headers["location"] == "/docs"
    answer = server.http.get("/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    page = Elements(answer.text)
    assert "script" not in {tag for tag, _ in page.elements}
    attributes = [(name, value or "") for _, attrs in page.elements for name, value in attrs.items()]
    assert not [name for name, _ in attributes if name.startswith("on") or name in ("src", "style")]
    assert not [
        value for name, value in attributes if name == "href" and not re.match(r"#|openapi\.json$", value)
    ]

    (style,) = page.styles
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    allowed = policy(answer.headers["content-security-policy"])
    assert allowed["default-src"] == "'none'"
    assert allowed["style-src"] == f"'sha256-{digest}'"
    assert allowed["frame-ancestors"] == "'none'"
    for path in server.http.get("/openapi.json").json()["paths"]:
        assert path in answer.text
    targets = {value.removeprefix("#") for name, value in attributes if name == "href" and value[0] == "#"}
    assert targets <= {value for name, value in attributes if name == "id"}
    assert server.http.get("/redoc").status_code == 404


def test_what_a_schema_says_is_text_on_that_page() -> None:
    evil = "<script>alert(1)</script>\"'"
    parameter = {"name": evil, "in": evil, "description": evil, "schema": {"enum": [evil]}}
    body = {"content": {evil: {"schema": {"$ref": f"#/components/schemas/{evil}"}}}}
    operation = {
        "description": evil,
        "parameters": [parameter],
        "requestBody": body,
        "responses": {evil: body},
    }
    fields = {evil: {"type": evil, "description": evil, "default": evil}}
    schema = {
        "info": {"title": evil, "version": evil, "description": evil},
        "paths": {evil: {"get": operation}},
        "components": {"schemas": {evil: {"description": evil, "properties": fields}}},
    }
    page = docs_page(schema)
    assert "<script" not in page
    assert {
        tag for tag, attrs in Elements(page).elements if any(name.startswith("on") for name in attrs)
    } == set()
    assert "'unsafe" not in DOCS_POLICY


def test_without_keys_a_page_cannot_rebind_its_name_to_a_service_that_listens_wide(
    make_server: Any,
) -> None:
    service = make_server(
        FINETUNING_HOST="0.0.0.0", FINETUNING_ALLOW_UNAUTHENTICATED="1", FINETUNING_ALLOWED_HOSTS="tuner"
    )
    for host in ("127.0.0.1", "192.168.7.9:8015", "[2001:db8::1]:8015", "localhost", "tuner:8015", "TUNER"):
        assert service.http.get("/v1/files", headers={"host": host}).is_success, host
    for host in ("evil.example", "127.0.0.1.evil.example", "0x7f.1.evil", "tuner.evil.example"):
        answer = service.http.get("/v1/files", headers={"host": host})
        assert answer.status_code == 400, host
        assert answer.json()["detail"].endswith("can add the name to FINETUNING_ALLOWED_HOSTS.")
    evil = {"host": "evil.example:8015", "origin": "http://evil.example:8015"}
    assert service.http.post("/v1/models", content=b"{}", headers=evil).status_code == 400


def test_where_there_are_keys_any_name_will_do_since_a_page_has_none(make_server: Any) -> None:
    service = make_server(FINETUNING_HOST="0.0.0.0", FINETUNING_API_KEYS="key")
    assert service.http.get("/v1/files", headers={"host": "tuner"}).is_success
