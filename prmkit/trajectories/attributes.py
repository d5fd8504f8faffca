"""The attributes of a span as one tree: exporters write them as pairs, as dotted names or nested."""

from collections.abc import Mapping
from typing import Any

import orjson


def parsed(value: Any) -> Any:
    """A value that may be JSON in a string."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return orjson.loads(value)
        except orjson.JSONDecodeError:
            return value
    return value


def attributes_of(span: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes as one tree, whether the file has pairs, dotted names or a tree."""
    given = span.get("attributes")
    if isinstance(given, list):  # OTLP: [{"key": …, "value": {"stringValue": …}}]
        given = {pair["key"]: _plain(pair.get("value")) for pair in given if isinstance(pair, dict) and "key" in pair}
    return undotted(given) if isinstance(given, dict) else {}


def _plain(value: Any) -> Any:
    if not isinstance(value, dict) or len(value) != 1:
        return value
    ((kind, inner),) = value.items()
    if kind == "arrayValue":
        return [_plain(each) for each in (inner or {}).get("values") or ()]
    if kind == "kvlistValue":
        return {pair["key"]: _plain(pair.get("value")) for pair in (inner or {}).get("values") or ()}
    return inner


def undotted(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.0.b": 1}` as `{"a": [{"b": 1}]}`."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *path, leaf = str(key).split(".")
        place = tree
        for name in path:
            inner = place.setdefault(name, {})
            if not isinstance(inner, dict):
                break  # a name that is a value and a prefix: the value stays
            place = inner
        else:
            place.setdefault(leaf, undotted(value) if isinstance(value, dict) else value)
    return {key: _listed(value) for key, value in tree.items()}


def _listed(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    inner = {key: _listed(each) for key, each in value.items()}
    if inner and all(key.isdigit() for key in inner):
        return [inner[key] for key in sorted(inner, key=int)]
    return inner


def at(tree: Any, *path: str) -> Any:
    """The value at a path of a tree; None where the path ends early."""
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def nested(span: Mapping[str, Any]) -> Mapping[str, Any]:
    """A span whose own fields are dotted names too (`attributes.llm.…`), as Phoenix's data frames have them."""
    return undotted(span) if any(str(key).startswith("attributes.") for key in span) else span


def offered(attributes: Mapping[str, Any]) -> list[Any]:
    """The tools that OpenInference lists, each as the JSON schema that the model got."""
    listed = at(attributes, "llm", "tools")
    found = [undotted(each) for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    return [parsed(at(each, "tool", "json_schema")) for each in found]
