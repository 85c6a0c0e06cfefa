"""How several processes share the work."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from pyfastlora.trainer.config.values import Int, Keys

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2", "fsdp2_offload")
#: FSDP1's names for what FSDP2 has, and what it does not need any more.
_RENAMED = {"cpu_offload": "offload_params", "fsdp_offload_params": "offload_params"}
_DONE_ANYWAY = {
    *("state_dict_type", "final_state_dict_type", "auto_wrap_policy", "cpu_ram_efficient_loading"),
    *("sync_module_states", "use_orig_params", "backward_prefetch", "backward_prefetch_policy"),
    *("forward_prefetch", "limit_all_gathers", "fsdp_version", "version"),
}


class FsdpKeys(Keys):
    """fsdp_config: of strategy fsdp2; FSDP1's names, with fsdp_ before them, are taken too."""

    offload_params: bool = Field(
        default=False, description="shards rest in CPU memory, as with fsdp2_offload"
    )
    reshard_after_forward: bool = Field(
        default=True, description="free a layer's full weights between forward and backward (FULL_SHARD)"
    )
    transformer_layer_cls_to_wrap: str | list[str] | None = Field(
        default=None, description="class of the modules sharded one by one (default: the model's own list)"
    )

    @classmethod
    def renamed(cls, given: Any) -> Any:
        """What is written, with FSDP2's names."""
        if not isinstance(given, dict):
            return given
        found: dict[str, Any] = {}
        for key, value in given.items():
            name = _RENAMED.get(key, key.removeprefix("fsdp_"))
            if name == "sharding_strategy":
                name, value = "reshard_after_forward", _reshards(value)
            if name not in _DONE_ANYWAY:
                found[name] = value
        return found


class EngineKeys(Keys):
    """How several processes share the work."""

    strategy: Literal[STRATEGIES] | None = Field(  # type: ignore[valid-type]
        None, description="what each process holds (default: ddp, everything)"
    )
    deepspeed: str | dict[str, Any] | None = Field(
        None, description="a DeepSpeed JSON file, its content, or zero1, zero2, zero3, zero3_offload"
    )
    fsdp_config: FsdpKeys = Field(FsdpKeys(), description="details of fsdp2")
    ddp_timeout: Int | None = Field(None, gt=0, description="seconds a process waits for the others (1800)")
    ddp_bucket_cap_mb: Int | None = Field(None, gt=0, description="size of a sum of gradients, in MB")
    ddp_broadcast_buffers: bool | None = Field(None, description="send buffers round at each forward")
    ddp_find_unused_parameters: bool = Field(
        False, description="look for parameters without gradient at each step"
    )

    @field_validator("fsdp_config", mode="before")
    @classmethod
    def _fsdp2(cls, value: Any) -> Any:
        return FsdpKeys.renamed(value)


def _reshards(strategy: Any) -> Any:
    known = {"FULL_SHARD": True, "1": True, "SHARD_GRAD_OP": False, "2": False}
    found = known.get(str(strategy).upper())
    if found is None:
        raise ValueError(f"must be FULL_SHARD or SHARD_GRAD_OP as sharding_strategy; got {strategy}")
    return found
