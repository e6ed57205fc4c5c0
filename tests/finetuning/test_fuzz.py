"""Bodies that nobody thought of, made from the schema and from plain JSON: no answer is a 5xx."""

from __future__ import annotations

import json
from typing import Any

from fixtures_models import save_tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from service_process import ServiceProcess

MODEL, FILE = "org/fuzz", "fuzz.jsonl"

_LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
ANYTHING = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)


def mostly(usual: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 15).flatmap(lambda n: usual if n else ANYTHING)


def like(schema: dict[str, Any], components: dict[str, Any]) -> st.SearchStrategy[Any]:
    """JSON as ``schema`` describes it, or nearly so."""
    if reference := schema.get("$ref"):
        return like(components[reference.rpartition("/")[2]], components)
    if choices := schema.get("anyOf"):
        return st.one_of([like(choice, components) for choice in choices])
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    match schema.get("type"):
        case "object":
            fields = {
                name: mostly(like(each, components)) for name, each in schema.get("properties", {}).items()
            }
            return st.fixed_dictionaries({}, optional=fields)
        case "array":
            return st.lists(mostly(like(schema.get("items", {}), components)), max_size=3)
        case "string":
            return st.sampled_from([MODEL, FILE, "q_proj", "8,4", "heuristic", "auto"]) | st.text()
        case "integer" | "number":
            return st.integers(0, 16) | st.integers() | st.floats(0, 1)
        case "boolean":
            return st.booleans()
    return ANYTHING


def test_no_body_makes_the_service_fail(server: ServiceProcess) -> None:
    save_tiny_model(server.models_dir / MODEL)
    row = b'{"instruction": "Say yes.", "output": "yes"}\n'
    server.openai.files.create(file=(FILE, row * 20), purpose="fine-tune")
    schema = server.http.get("/openapi.json").json()
    components = schema["components"]["schemas"]
    bodies = {
        path: like(methods["post"]["requestBody"]["content"]["application/json"]["schema"], components)
        for path, methods in schema["paths"].items()
        if "application/json" in methods.get("post", {}).get("requestBody", {}).get("content", {})
    }

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(sorted(bodies)), st.data())
    def ask(path: str, data: st.DataObject) -> None:
        body = data.draw(bodies[path])
        if isinstance(body, dict) and path.endswith("/jobs"):
            body |= {"model": MODEL, "training_file": FILE}
        answer = server.http.post(path, content=json.dumps(body))
        assert answer.status_code < 500, answer.text
        if answer.is_error:
            assert answer.json()["detail"] == answer.json()["error"]["message"]

    ask()
    assert server.http.get("/health").is_success
