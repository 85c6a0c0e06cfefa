"""Rules between the keys of schedule, optimizer and the adapter's kind. rules.py has the others."""

from __future__ import annotations

from collections.abc import Iterator

from pyfastlora.trainer.config.optimisation import BNB_OPTIMIZERS, TORCHAO_OPTIMIZERS
from pyfastlora.trainer.config.schema import Config

Conflict = tuple[tuple[str, ...], str]


def _shapes_have_their_schedule(c: Config) -> Iterator[Conflict]:
    for key, schedule in (
        ("lr_quadratic_warmup", "cosine"),
        ("cosine_min_lr_ratio", "cosine"),
        ("cosine_constant_lr_ratio", "cosine"),
        ("lr_div_factor", "one_cycle"),
        ("log_sweep_min_lr", "log_sweep"),
        ("log_sweep_max_lr", "log_sweep"),
    ):
        if getattr(c, key) != Config.model_fields[key].default and c.lr_scheduler != schedule:
            yield (
                (key, "lr_scheduler"),
                f"{key} goes with lr_scheduler: {schedule}; got lr_scheduler: {c.lr_scheduler}",
            )
    if c.cosine_constant_lr_ratio is not None and c.cosine_min_lr_ratio is None:
        both = ("cosine_constant_lr_ratio", "cosine_min_lr_ratio")
        yield both, "cosine_constant_lr_ratio: constant at which rate? set cosine_min_lr_ratio"
    ours = c.lr_scheduler in ("one_cycle", "log_sweep", "rex") or c.lr_quadratic_warmup
    if c.lr_scheduler_kwargs and (ours or c.cosine_min_lr_ratio is not None):
        both = ("lr_scheduler_kwargs", "lr_scheduler")
        yield both, "lr_scheduler_kwargs goes with a schedule of transformers; this one has keys of its own"
    if c.lr_scheduler == "constant" and c.lr_scheduler_kwargs:
        both = ("lr_scheduler_kwargs", "lr_scheduler")
        yield both, "lr_scheduler: constant has no arguments; remove lr_scheduler_kwargs"
    if c.lr_scheduler == "constant" and (c.warmup_steps or c.warmup_ratio):
        keys = ("warmup_steps", "warmup_ratio", "lr_scheduler")
        yield keys, "lr_scheduler: constant has no warm-up; say constant_with_warmup"
    if c.lr_scheduler == "log_sweep" and (c.warmup_steps or c.warmup_ratio):
        keys = ("warmup_steps", "warmup_ratio", "lr_scheduler")
        yield keys, "log_sweep rises from its first step on; remove the warm-up"


def _one_rate_for_a_parameter(c: Config) -> Iterator[Conflict]:
    if c.loraplus_lr_ratio is not None and c.adapter is None:
        yield ("loraplus_lr_ratio", "adapter"), "loraplus_lr_ratio is of an adapter's B; set adapter"
    default = Config.model_fields["loraplus_lr_embedding"].default
    if c.loraplus_lr_embedding != default and c.loraplus_lr_ratio is None:
        both = ("loraplus_lr_embedding", "loraplus_lr_ratio")
        yield both, "loraplus_lr_embedding goes with loraplus_lr_ratio"
    if c.embedding_lr is not None and c.embedding_lr_scale is not None:
        both = ("embedding_lr", "embedding_lr_scale")
        yield both, "embedding_lr and embedding_lr_scale say the same in two ways; keep one"


def _compiled_or_not(c: Config) -> Iterator[Conflict]:
    for key in ("torch_compile_backend", "torch_compile_mode"):
        if getattr(c, key) is not None and not c.torch_compile:
            yield (key, "torch_compile"), f"{key} goes with torch_compile: true"
    if c.torch_compile and (c.strategy or "").startswith("fsdp2"):
        yield (
            ("torch_compile", "strategy"),
            f"torch_compile would trace the gathering of weights ({c.strategy}); remove one of the two",
        )


def _quantised_start(c: Config) -> Iterator[Conflict]:
    init = c.peft_init_lora_weights
    if init == "loftq" and c.adapter != "qlora":
        yield (
            ("peft_init_lora_weights", "adapter"),
            "peft_init_lora_weights: loftq makes up for 4-bit weights; it goes with adapter: qlora",
        )
    if c.changes_base and (c.bits is not None):
        key, what = _what_changes(c)
        yield (
            (key, "adapter", "load_in_8bit"),
            f"{what} changes the base, and a quantised one would be rounded each time; use a dense base",
        )


def _base_changes_alone(c: Config) -> Iterator[Conflict]:
    if not c.changes_base:
        return
    key, what = _what_changes(c)
    divided = c.strategy if c.strategy not in (None, "ddp") else "deepspeed" if c.deepspeed else None
    if divided:
        yield (
            (key, "strategy", "deepspeed"),
            f"{what} changes whole weights of the base, which {divided} divides; use ddp",
        )


def _relora_restarts(c: Config) -> Iterator[Conflict]:
    if not c.relora:
        for key in ("relora_prune_ratio", "jagged_restart_steps"):
            if getattr(c, key) != Config.model_fields[key].default:
                yield (key, "relora"), f"{key} goes with relora: true"
        return
    if c.jagged_restart_steps not in (None, c.relora_steps):
        both = ("jagged_restart_steps", "relora_steps")
        yield both, "relora_steps and jagged_restart_steps say the same in two ways; keep one"
    if c.relora_steps is None:
        yield ("relora", "adapter"), "relora: after how many steps is the adapter merged? set relora_steps"
    if c.adapter is None:
        yield ("relora", "adapter"), "relora restarts an adapter; set adapter: lora"
    if c.peft_use_dora:
        yield (
            ("relora", "peft_use_dora"),
            "relora adds the adapter to the base; a DoRA, which also scales it, is no sum; keep one",
        )
    if c.lora_model_dir is not None:
        yield ("relora", "lora_model_dir"), "relora begins with a fresh adapter; remove lora_model_dir"
    packed = "8bit" in c.optimizer or c.optimizer.startswith("paged")
    held = packed or c.optimizer in (*TORCHAO_OPTIMIZERS, "adafactor")
    if held or (c.optimizer in BNB_OPTIMIZERS and "32bit" not in c.optimizer):
        yield (
            ("relora", "optimizer"),
            f"relora sets part of the optimizer's states to 0, which {c.optimizer} packs; "
            "use adamw_torch_fused",
        )


def _what_changes(c: Config) -> tuple[str, str]:
    if c.relora:
        return "relora", "relora"
    return "peft_init_lora_weights", f"peft_init_lora_weights: {c.peft_init_lora_weights}"


def _goes_on_or_begins(c: Config) -> Iterator[Conflict]:
    if c.lora_model_dir is None:
        return
    for key in (
        *("lora_target_modules", "lora_target_linear", "lora_modules_to_save", "peft_layers_to_transform"),
        *("peft_trainable_token_indices", "peft_init_lora_weights"),
    ):
        if getattr(c, key) != Config.model_fields[key].default:
            yield (
                (key, "lora_model_dir"),
                f"{key} is of a fresh adapter; that in lora_model_dir has a configuration of its own",
            )


RULES_OF_TRAINING = (
    _shapes_have_their_schedule,
    _one_rate_for_a_parameter,
    _compiled_or_not,
    _quantised_start,
    _base_changes_alone,
    _relora_restarts,
    _goes_on_or_begins,
)
