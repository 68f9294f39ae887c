"""Architecture of a decoder-only transformer, read from its config.json; differences between architectures are data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

from lambdascale.checkpoints.documents import read_document
from lambdascale.core import UserError

# Far above the sizes of real models: a larger value is a mistake, which would cost memory and time before it was noticed.
_MOST_LAYERS, _LARGEST = 10_000, 1 << 31


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
        config = read_document(path)
    except FileNotFoundError:
        raise UserError(f"{directory} is not a model directory: it has no config.json") from None
    return parse_architecture(config, path)


def parse_architecture(config: Mapping[str, Any], where: object = "config.json") -> Architecture:
    """Architecture of a parsed config.json, which errors call ``where``; UserError unless it is complete and supported."""
    if not isinstance(config, Mapping):
        raise UserError(f"{where} does not hold a model's configuration")
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else "none given" if names is None else names
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UserError(f"{where}: architecture {name!s:.60} is not supported; choose from {', '.join(ARCHITECTURES)}")
    if config.get("quantization_config") is not None:
        method = config["quantization_config"]
        method = method.get("quant_method", "no method given") if isinstance(method, Mapping) else method
        raise UserError(f"{where} is that of a quantised checkpoint ({method!s:.60}): only unquantised weights can be packed")
    return _Reader(config, where).architecture(name)


class _Reader:
    """Values of a config.json, each checked as it is read; errors call the file ``where``."""

    def __init__(self, config: Mapping[str, Any], where: object) -> None:
        self._config = config
        self._where = where

    def architecture(self, name: str) -> Architecture:
        """Return the architecture ``name`` with the config's values."""
        differences = ARCHITECTURES[name]
        self._only("hidden_act", "silu", "activation")
        self._only("partial_rotary_factor", 1.0, "partial rotary factor")
        layers, heads = self._count("num_hidden_layers", most=_MOST_LAYERS), self._count("num_attention_heads")
        hidden, kv_heads = self._count("hidden_size"), self._count("num_key_value_heads", heads)
        if heads % kv_heads:
            self._refuse(f"{heads} heads cannot share {kv_heads} KV heads (num_key_value_heads) evenly")
        theta, scaling = self._rope()
        return Architecture(
            name=name,
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=self._head_dim(hidden, heads),
            intermediate=self._count("intermediate_size"),
            vocab=self._count("vocab_size"),
            norm_eps=self._number(self._config, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position=self._count("max_position_embeddings"),
            tied=self._flag("tie_word_embeddings"),
            qkv_bias=self._bias(differences.qkv_bias),
            output_bias=self._bias(differences.output_bias),
            mlp_bias=self._bias(differences.mlp_bias),
            windows=self._windows(layers, differences.windows),
        )

    def _refuse(self, reason: str) -> NoReturn:
        raise UserError(f"{self._where}: {reason}")

    def _only(self, key: str, value: object, what: str) -> None:
        found = self._config.get(key, value)
        if found != value:
            self._refuse(f"{what} {found!r:.60} is not supported, only {value}")

    def _count(self, key: str, default: int | None = None, most: int = _LARGEST) -> int:
        """A whole number of at least 1; null and an absent key are the ``default``."""
        value = self._config.get(key)
        if value is None and default is not None:
            return default
        if key not in self._config:
            self._refuse(f"{key} is missing")
        if type(value) is not int or not 1 <= value <= most:
            self._refuse(f"{key} must be a whole number from 1 to {most}, not {value!r:.60}")
        return value

    def _number(self, found: Mapping[str, Any], key: str, default: float | None = None) -> float:
        """A number above 0."""
        value = found.get(key, default)
        if value is None:
            self._refuse(f"{key} is missing")
        if type(value) not in (int, float) or not 0 < value < _LARGEST**2 or not isfinite(value):
            self._refuse(f"{key} must be a positive number, not {value!r:.60}")
        return float(value)

    def _flag(self, key: str, default: bool = False) -> bool:
        value = self._config.get(key)
        if value is not None and not isinstance(value, bool):
            self._refuse(f"{key} must be true or false, not {value!r:.60}")
        return default if value is None else value

    def _bias(self, rule: bool | str) -> bool:
        return self._flag(rule) if isinstance(rule, str) else rule

    def _head_dim(self, hidden: int, heads: int) -> int:
        if self._config.get("head_dim") is None and hidden % heads:
            self._refuse(f"hidden_size {hidden} is not a multiple of the {heads} heads, and head_dim is not given")
        size = self._count("head_dim", hidden // heads)
        if size % 2:
            self._refuse(f"heads have {size} elements each: rotary position embeddings need an even number")
        return size

    def _rope(self) -> tuple[float, RopeScaling | None]:
        """Base and scaling, from the older keys (rope_theta, rope_scaling) or the newer one (rope_parameters)."""
        found: dict[str, Any] = {"rope_theta": self._config.get("rope_theta", 10_000.0)}
        for key in ("rope_scaling", "rope_parameters"):
            part = self._config.get(key)
            if part is not None and (not isinstance(part, Mapping) or any(isinstance(value, Mapping) for value in part.values())):
                self._refuse(f"{key} {part!r:.60} is not supported: it must map names to values, the same for all layers")
            found |= part or {}
        theta = self._number(found, "rope_theta")
        kind = found.get("rope_type", found.get("type", "default"))
        if kind == "default":
            return theta, None
        if kind != "llama3":
            self._refuse(f"rope scaling {kind!r:.60} is not supported, only default and llama3")
        low, high = self._number(found, "low_freq_factor"), self._number(found, "high_freq_factor")
        if low >= high:
            self._refuse(f"low_freq_factor {low:g} must be below high_freq_factor {high:g}")
        original = self._number(found, "original_max_position_embeddings")
        return theta, RopeScaling(
            factor=self._number(found, "factor"),
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_position=int(original),
        )

    def _windows(self, layers: int, defaults: _Windows | None) -> tuple[int | None, ...]:
        """Sliding windows per layer: by layer_types where given, else by use_sliding_window and max_window_layers."""
        config = self._config
        if defaults is None or config.get("sliding_window") is None or not self._flag("use_sliding_window", defaults.used):
            return (None,) * layers
        window, kinds = self._count("sliding_window"), config.get("layer_types")
        if kinds is None:
            first = config.get("max_window_layers", defaults.first_layer)
            if type(first) is not int or first < 0:
                self._refuse(f"max_window_layers must be a whole number of at least 0, not {first!r:.60}")
            return (None,) * min(first, layers) + (window,) * max(0, layers - first)
        if not isinstance(kinds, list) or len(kinds) != layers:
            self._refuse(f"layer_types must name a kind for each of the {layers} layers")
        places = {"sliding_attention": window, "full_attention": None}
        unknown = next((kind for kind in kinds if not isinstance(kind, str) or kind not in places), None)
        if unknown is not None:
            self._refuse(f"layer_types names {unknown!r:.60}, which is not supported, only {', '.join(places)}")
        return tuple(places[kind] for kind in kinds)
