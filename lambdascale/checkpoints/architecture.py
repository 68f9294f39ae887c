"""Architecture of a decoder-only transformer, read from its config.json; differences between architectures are data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lambdascale.core import UserError


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's scaling of rotary frequencies (``rope_scaling`` of type llama3 in its config)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Shapes and switches of a model. ``windows[i]``: number of tokens layer i attends to (itself included), None for all."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position: int
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    windows: tuple[int | None, ...]

    @property
    def kv_bytes_per_token(self) -> int:
        """Number of KV-cache elements of one token over all layers; multiply by the element size for bytes."""
        return 2 * self.layers * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class _Differences:
    """Differences of an architecture from Llama."""

    qkv_bias: bool | str = "attention_bias"  # a string: the config's own key, False if absent
    output_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = "mlp_bias"
    windows: _Windows | None = None


@dataclass(frozen=True)
class _Windows:
    """Defaults for a config that does not specify them: ``used``, whether it has sliding windows, from ``first_layer`` on."""

    used: bool
    first_layer: int


ARCHITECTURES = {
    "LlamaForCausalLM": _Differences(),
    "MistralForCausalLM": _Differences(qkv_bias=False, output_bias=False, mlp_bias=False, windows=_Windows(True, 0)),
    "Qwen2ForCausalLM": _Differences(qkv_bias=True, output_bias=False, mlp_bias=False, windows=_Windows(False, 28)),
}


def load_architecture(directory: Path) -> Architecture:
    """Read the architecture from ``directory``/config.json; UserError if it is missing, unreadable or unsupported."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{directory} is not a model directory: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    return parse_architecture(config, path)


def parse_architecture(config: Mapping[str, Any], where: object = "config.json") -> Architecture:
    """Architecture of a parsed config.json, which errors call ``where``; UserError if it is incomplete or unsupported."""
    if not isinstance(config, Mapping):
        raise UserError(f"{where} does not hold a model's configuration")
    names = config.get("architectures") or ["none given"]
    if names[0] not in ARCHITECTURES:
        raise UserError(f"{where}: architecture {names[0]} is not supported; choose from {', '.join(ARCHITECTURES)}")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: activation {config['hidden_act']} is not supported, only silu")
    try:
        return _parse(names[0], config, where)
    except KeyError as error:
        raise UserError(f"{where}: {error} is missing") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where} holds an invalid value: {error}") from error


def _parse(name: str, config: Mapping[str, Any], where: object) -> Architecture:
    differences = ARCHITECTURES[name]

    def bias(rule: bool | str) -> bool:
        return bool(config.get(rule, False)) if isinstance(rule, str) else rule

    heads, hidden, layers = config["num_attention_heads"], config["hidden_size"], config["num_hidden_layers"]
    theta, scaling = _rope(config, where)
    return Architecture(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        intermediate=config["intermediate_size"],
        vocab=config["vocab_size"],
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position=config["max_position_embeddings"],
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=bias(differences.qkv_bias),
        output_bias=bias(differences.output_bias),
        mlp_bias=bias(differences.mlp_bias),
        windows=_windows(config, layers, differences.windows),
    )


def _rope(config: Mapping[str, Any], where: object) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from the older keys (rope_theta, rope_scaling) or the newer one (rope_parameters)."""
    found = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    theta = float(found.get("rope_theta", config.get("rope_theta", 10_000.0)))
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f"{where}: rope scaling {kind!r} is not supported, only default and llama3")
    return theta, RopeScaling(
        factor=float(found["factor"]),
        low_freq_factor=float(found["low_freq_factor"]),
        high_freq_factor=float(found["high_freq_factor"]),
        original_max_position=int(found["original_max_position_embeddings"]),
    )


def _windows(config: Mapping[str, Any], layers: int, defaults: _Windows | None) -> tuple[int | None, ...]:
    """Sliding windows per layer: by layer_types where given, else by use_sliding_window and max_window_layers."""
    window = config.get("sliding_window")
    if defaults is None or window is None or not config.get("use_sliding_window", defaults.used):
        return (None,) * layers
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", defaults.first_layer)
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)
