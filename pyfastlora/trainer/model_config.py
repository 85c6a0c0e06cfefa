"""A model's own configuration (config.json) with overrides_of_model_config in place."""

from __future__ import annotations

import difflib
import os
from typing import Any

from pyfastlora.trainer.config import Config
from pyfastlora.trainer.errors import ConfigError

KEY = "overrides_of_model_config"


def load_model_config(config: Config) -> Any:
    """What the model is built from. Raises what transformers raises where it cannot be read."""
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(
        os.path.expanduser(config.base_model),
        revision=config.revision_of_model,
        trust_remote_code=config.trust_remote_code,
    )
    return apply_overrides(found, config.overrides_of_model_config)


def apply_overrides(config: Any, overrides: dict[str, Any]) -> Any:
    """config (a PretrainedConfig) with values replaced, mappings key by key.

    rope_scaling is taken for rope_parameters, its name since transformers 5. Raises ConfigError for a name
    that the configuration has not, and for RoPE parameters that transformers does not take.
    """
    known = set(config.to_dict())
    for name, value in overrides.items():
        at = "rope_parameters" if name == "rope_scaling" else name
        if at not in known and not hasattr(config, at):
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{KEY}.{name}: {type(config).__name__} has no such value{hint}")
        held = getattr(config, at)
        if at == "rope_parameters" and isinstance(value, dict):
            value = _rope(config, value)
        if isinstance(held, dict) and isinstance(value, dict):
            value = held | {k: held[k] | v if _are_dicts(held.get(k), v) else v for k, v in value.items()}
        setattr(config, at, value)
    if {"rope_scaling", "rope_parameters"} & overrides.keys():
        _check_rope(config)
    return config


def _are_dicts(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


def _rope(config: Any, given: dict[str, Any]) -> dict[str, Any]:
    """RoPE parameters with today's name of their type. Raises ConfigError where a model has several sets."""
    kinds = config.nested_rope_parameter_keys(config.rope_parameters or {})
    if kinds and not set(given) <= set(kinds):
        raise ConfigError(
            f"{KEY}.rope_scaling: {type(config).__name__} has RoPE parameters for each kind of layer; say "
            f"which: {{rope_parameters: {{{next(iter(kinds))}: {{..}}}}}}, of {', '.join(kinds)}"
        )
    sets = given.values() if kinds else [given]
    for each in sets:
        if "type" in each:
            each["rope_type"] = each.pop("type")
    return given


def _check_rope(config: Any) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    nested = config.nested_rope_parameter_keys(config.rope_parameters)
    for each in [config.rope_parameters[key] for key in nested] or [config.rope_parameters]:
        kind = each.get("rope_type", "default")
        kinds = sorted({"default", *ROPE_INIT_FUNCTIONS})
        if kind not in kinds:
            raise ConfigError(f"{KEY}.rope_scaling: type must be one of {', '.join(kinds)}; got {kind}")
        factor = each.get("factor", 1.0)
        if not isinstance(factor, int | float) or factor < 1:
            raise ConfigError(f"{KEY}.rope_scaling: factor must be a number of at least 1; got {factor}")
    try:
        config.standardize_rope_params()
        config.validate_rope()
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"{KEY}.rope_scaling: {error}") from error
