"""The page that lists what can be asked, made of the OpenAPI description alone: no script, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;width:100%}td,th{border:1px solid #bbb;padding:.2rem .5rem;text-align:left;"
    "vertical-align:top}code{background:#eee;color:#111;padding:0 .2rem}"
)
JSON = "application/json"


def reference_page(openapi: Mapping[str, Any]) -> str:
    """HTML of an OpenAPI description."""
    schemas = openapi["components"]["schemas"]
    title = escape(openapi["info"]["title"])
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"]
    parts += [f"<h1>{title}</h1><p>For programs: <a href=/openapi.json>openapi.json</a></p>"]
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            parts += _operation(f"{method.upper()} {path}", operation, schemas)
    return "".join(parts)


def _operation(name: str, operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[str]:
    yield f"<h2><code>{escape(name)}</code></h2><p>{escape(operation.get('description', ''))}</p>"
    # What stands in the path is in the heading.
    asked = {one["name"]: one["schema"] for one in operation.get("parameters", ()) if one["in"] == "query"}
    for kind in operation.get("requestBody", {}).get("content", {}).values():
        asked |= kind["schema"]["properties"]
    yield _table("asks", asked)
    answers = operation["responses"].get("200", {}).get("content", {}).get(JSON, {}).get("schema", {})
    if "$ref" in answers:
        yield _table("answers", schemas[answers["$ref"].rpartition("/")[2]]["properties"])


def _table(what: str, fields: Mapping[str, Any]) -> str:
    rows = (
        f"<tr><td><code>{escape(name)}</code><td>{escape(_kind(schema))}<td>{escape(schema.get('description', ''))}"
        for name, schema in fields.items()
    )
    return f"<table><tr><th>{what}<th>type<th>{''.join(rows)}</table>" if fields else ""


def _kind(schema: Mapping[str, Any]) -> str:
    """A schema in a few words."""
    if "anyOf" in schema:
        return " or ".join(_kind(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "enum" in schema or "const" in schema:
        return " or ".join(map(str, schema.get("enum", [schema.get("const")])))
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'])}"
    return "file" if schema.get("format") == "binary" else str(schema.get("type", "any"))
