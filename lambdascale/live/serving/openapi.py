"""The server's description of itself in OpenAPI 3.1, made from the types that its bodies are decoded with."""

from __future__ import annotations

from typing import Any

import msgspec

from lambdascale import __version__
from lambdascale.live.serving.openai_api import ChatBody, CompletionBody
from lambdascale.live.serving.reasons import REASONS

_REFS = "#/components/schemas/{name}"
_JSON = "application/json"
_ERRORS = {
    "400": "The request is not valid, or has a parameter that this server does not support; `param` names it.",
    "403": "It comes from another site's page.",
    "404": "The model does not exist.",
    "408": "The request did not come whole in time.",
    "413": "The body is too long.",
    "415": "The body is compressed.",
    "421": "The Host header names another server.",
    "429": "The queue, or the client's share of it, is full. Retry-After: an estimate in seconds.",
    "431": "The headers are too long.",
    "503": "The cluster cannot answer.",
    "504": "No token came in time.",
}
_REFUSALS = ("400", "403", "408", "421", "431")
_ANSWERS = ("400", "403", "404", "408", "413", "415", "421", "429", "431", "503", "504")
_PIECES: dict[str, Any] = {
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"enum": list(REASONS)},
                },
            }
        },
    },
    "Condition": {
        "type": "object",
        "required": ["status"],
        "properties": {"status": {"enum": ["ok", "unavailable"]}, "reason": {"type": "string"}},
    },
    "Model": {
        "type": "object",
        "required": ["id", "object", "created", "owned_by", "max_model_len"],
        "properties": {
            "id": {"type": "string"},
            "object": {"const": "model"},
            "created": {"type": "integer"},
            "owned_by": {"type": "string"},
            "max_model_len": {"type": "integer"},
        },
    },
    "Models": {
        "type": "object",
        "required": ["object", "data"],
        "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": {"$ref": _REFS.format(name="Model")}}},
    },
    "Usage": {
        "type": "object",
        "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
        "properties": {name: {"type": "integer"} for name in ("prompt_tokens", "completion_tokens", "total_tokens")},
    },
}


def describe(model: str, keyed: bool) -> dict[str, Any]:
    """Return the description of a server of ``model``; ``keyed``: requests need a key."""
    _, bodies = msgspec.json.schema_components([CompletionBody, ChatBody], ref_template=_REFS)
    for name in ("CompletionBody", "ChatBody"):
        bodies[name]["properties"]["model"] = {"const": model}
    paths = {
        "/v1/completions": {"post": _answer("Complete prompts.", "CompletionBody", _choice("text", {"type": "string"}))},
        "/v1/chat/completions": {"post": _answer("Answer a conversation.", "ChatBody", _choice("message", {"type": "object"}))},
        "/v1/models": {"get": _get("List the model served.", _ref("Models"))},
        "/v1/models/{model}": {"get": _model()},
        "/health": {"get": _condition("Tell if the server is alive: it runs, and a node is alive.")},
        "/ready": {"get": _condition("Tell if a request would be answered right now.")},
        "/metrics": {"get": _get("Prometheus metrics.", {"type": "string"}, "text/plain")},
        "/cluster": {"get": _get("The cluster: nodes, instances, transfers, requests.", {"type": "object"})},
        "/openapi.json": {"get": _get("This description.", {"type": "object"})},
    }
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "λScale", "version": __version__, "description": "OpenAI-compatible front end of a live cluster."},
        "paths": paths,
        "components": {"schemas": bodies | _PIECES},
    }
    if keyed:
        _add_keys(described)
    return described


def _add_keys(described: dict[str, Any]) -> None:
    described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    refused = _response("The API key is missing or wrong.", _ref("Error"))
    for path, methods in described["paths"].items():
        for operation in methods.values():
            if path not in ("/health", "/ready"):
                operation["security"] = [{"key": []}]
                operation["responses"]["401"] = refused


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": _REFS.format(name=name)}


def _response(text: str, schema: dict[str, Any], media: str = _JSON) -> dict[str, Any]:
    return {"description": text, "content": {media: {"schema": schema}}}


def _errors(statuses: tuple[str, ...]) -> dict[str, Any]:
    return {status: _response(_ERRORS[status], _ref("Error")) for status in statuses}


def _get(text: str, schema: dict[str, Any], media: str = _JSON) -> dict[str, Any]:
    return {"summary": text, "responses": {"200": _response("As asked.", schema, media)} | _errors(_REFUSALS)}


def _condition(text: str) -> dict[str, Any]:
    made = _get(text, _ref("Condition"))
    made["responses"]["503"] = _response("It is not; `reason` says why.", _ref("Condition"))
    return made


def _model() -> dict[str, Any]:
    made = _get("Describe the model served.", _ref("Model"))
    made["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}]
    made["responses"] |= _errors(("404",))
    return made


def _choice(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    choice = {
        "type": "object",
        "required": ["index", name, "finish_reason"],
        "properties": {"index": {"type": "integer"}, name: schema, "finish_reason": {"enum": ["stop", "length"]}},
    }
    return {
        "type": "object",
        "required": ["id", "object", "created", "model", "choices", "usage"],
        "properties": {"choices": {"type": "array", "items": choice}, "usage": _ref("Usage")},
    }


def _answer(text: str, body: str, whole: dict[str, Any]) -> dict[str, Any]:
    answered = _response("The answer, or, with stream=true, its pieces as server-sent events.", whole)
    event = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
    answered["content"]["text/event-stream"] = {"schema": event}
    return {
        "summary": text,
        "requestBody": {"required": True, "content": {_JSON: {"schema": _ref(body)}}},
        "responses": {"200": answered} | _errors(_ANSWERS),
    }
