"""The page at ``/docs``: the OpenAPI schema for people, in plain HTML.

No scripts: what FastAPI offers loads its code from other people's servers, which a service on a closed
network cannot reach and one with other people's data should not trust.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator
from html import escape
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }
code, b.method { font-family: ui-monospace, monospace }
b.method { display: inline-block; width: 4.5em }
details { border-top: 1px solid #ccc; padding: .4em 0 }
table { border-collapse: collapse; margin: .5em 0 }
td { border-top: 1px solid #eee; padding: .2em .8em .2em 0; vertical-align: top }
"""
_DIGEST = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
DOCS_POLICY = f"default-src 'none'; style-src 'sha256-{_DIGEST}'; base-uri 'none'; frame-ancestors 'none'"


def docs_page(schema: dict[str, Any]) -> str:
    """The whole page for an OpenAPI ``schema``."""
    title = escape(schema["info"]["title"])
    operations = (
        _operation(path, method, operation)
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    )
    objects = (
        _details(f'<code id="{escape(name)}">{escape(name)}</code>', _object(each))
        for name, each in schema.get("components", {}).get("schemas", {}).items()
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>{title} {escape(schema['info']['version'])}</h1><p>{escape(schema['info']['description'])} "
        '<a href="openapi.json">openapi.json</a> says the same for programs.</p>'
        f"<h2>Routes</h2>{''.join(operations)}<h2>Objects</h2>{''.join(objects)}</html>"
    )


def _details(summary: str, inside: str) -> str:
    return f"<details><summary>{summary}</summary>{inside}</details>"


def _operation(path: str, method: str, operation: dict[str, Any]) -> str:
    about = operation.get("description") or operation.get("summary", "")
    rows = [
        (f"{each['name']} ({each['in']})", _type(each.get("schema", {})), each.get("description", ""))
        for each in operation.get("parameters", ())
    ]
    for media, body in operation.get("requestBody", {}).get("content", {}).items():
        rows.append(("body", _type(body.get("schema", {})), media))
    for status, answer in operation.get("responses", {}).items():
        for media, body in answer.get("content", {}).items():
            rows.append((f"answer {status}", _type(body.get("schema", {})), media))
    summary = f'<b class="method">{method.upper()}</b> <code>{escape(path)}</code>'
    return _details(summary, f"<p>{escape(about)}</p>{_table(rows)}")


def _object(schema: dict[str, Any]) -> str:
    rows = (
        (name, _type(each) + _default(each), each.get("description", ""))
        for name, each in schema.get("properties", {}).items()
    )
    return f"<p>{escape(schema.get('description', ''))}</p>{_table(rows)}"


def _table(rows: Iterable[tuple[str, str, str]]) -> str:
    """Rows of a name, a kind in HTML, and words."""
    cells = (
        f"<tr><td><code>{escape(name)}</code></td><td>{kind}</td><td>{escape(about)}</td></tr>"
        for name, kind, about in rows
    )
    return f"<table>{''.join(cells)}</table>"


def _type(schema: dict[str, Any]) -> str:
    """A schema in a few words of HTML; references link to the object they name."""
    return " or ".join(dict.fromkeys(_kinds(schema)))


def _kinds(schema: dict[str, Any]) -> Iterator[str]:
    if reference := schema.get("$ref"):
        name = escape(reference.rpartition("/")[2])
        yield f'<a href="#{name}">{name}</a>'
    elif choices := schema.get("anyOf") or schema.get("oneOf"):
        for choice in choices:
            yield from _kinds(choice)
    elif "const" in schema or "enum" in schema:
        yield ", ".join(
            f"<code>{escape(json.dumps(value))}</code>" for value in schema.get("enum", [schema.get("const")])
        )
    elif schema.get("type") == "array":
        yield f"list of {_type(schema.get('items', {}))}"
    else:
        yield escape(str(schema.get("type", "anything")))


def _default(schema: dict[str, Any]) -> str:
    return f", default <code>{escape(json.dumps(schema['default']))}</code>" if "default" in schema else ""
