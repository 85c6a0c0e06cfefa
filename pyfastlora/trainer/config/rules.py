"""Rules between keys. Each yields the keys it is about and a sentence; load.py adds where they stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pyfastlora.trainer.config.data import DatasetKeys
from pyfastlora.trainer.config.model import BnbKeys
from pyfastlora.trainer.config.schema import Config
from pyfastlora.trainer.data.registry import CHATS

Conflict = tuple[tuple[str, ...], str]


def _bits_fit_adapter(c: Config) -> Iterator[Conflict]:
    keys = ("load_in_4bit", "adapter")
    if c.adapter == "qlora" and c.load_in_4bit is False:
        yield (
            keys,
            "adapter: qlora trains on 4-bit weights; remove load_in_4bit: false, or write adapter: lora",
        )
    if c.adapter == "lora" and c.load_in_4bit:
        yield keys, "load_in_4bit: true goes with adapter: qlora; got adapter: lora"
    if c.adapter == "lora" and c.bnb_config_kwargs != BnbKeys():
        yield (
            ("bnb_config_kwargs", "adapter"),
            "bnb_config_kwargs goes with adapter: qlora; got adapter: lora",
        )


def _something_is_adapted(c: Config) -> Iterator[Conflict]:
    if not c.lora_target_linear and not c.lora_target_modules:
        yield ("adapter",), "nothing to adapt: set lora_target_linear: true, or list lora_target_modules"
    if c.lora_target_linear and isinstance(c.lora_target_modules, str):
        yield (
            ("lora_target_modules", "lora_target_linear"),
            "lora_target_linear: true cannot be joined with a regular expression; keep one of the two",
        )


def _new_tokens_are_trained(c: Config) -> Iterator[Conflict]:
    if c.tokens and not c.lora_modules_to_save:
        yield (
            ("tokens", "lora_modules_to_save"),
            "tokens adds rows to the embeddings, which nobody would train or save; "
            "add lora_modules_to_save: [embed_tokens, lm_head] (their names in Llama)",
        )


def _one_precision(c: Config) -> Iterator[Conflict]:
    if c.fp16 and c.bf16 not in (False, "auto"):
        yield ("bf16", "fp16"), "bf16 and fp16 exclude each other; keep one"


def _steps_or_ratio(c: Config) -> Iterator[Conflict]:
    for first, second in (
        ("warmup_steps", "warmup_ratio"),
        ("eval_steps", "evals_per_epoch"),
        ("save_steps", "saves_per_epoch"),
    ):
        if getattr(c, first) is not None and getattr(c, second) is not None:
            yield (first, second), f"{first} and {second} say the same in two ways; keep one"


def _strategy_fits_steps(c: Config) -> Iterator[Conflict]:
    for what in ("eval", "save"):
        strategy, counts = getattr(c, f"{what}_strategy"), (f"{what}_steps", f"{what}s_per_epoch")
        for key in counts:
            if getattr(c, key) is not None and strategy not in (None, "steps"):
                yield (key, f"{what}_strategy"), f"{key} goes with {what}_strategy: steps; got {strategy}"
        if strategy == "steps" and all(getattr(c, key) is None for key in counts):
            yield (f"{what}_strategy",), f"{what}_strategy: steps needs {counts[0]} or {counts[1]}"


def _one_held_out_set(c: Config) -> Iterator[Conflict]:
    if c.test_datasets and c.val_set_size:
        yield ("val_set_size", "test_datasets"), "val_set_size and test_datasets both hold data out; keep one"
    if c.val_set_size >= 1 and c.val_set_size != int(c.val_set_size):
        yield (
            ("val_set_size",),
            f"val_set_size is a share below 1 or a whole number of samples; got {c.val_set_size}",
        )
    if not c.test_datasets and not c.val_set_size:
        for key in ("eval_steps", "evals_per_epoch", "eval_on_start"):
            if getattr(c, key):
                yield (
                    (key, "val_set_size"),
                    f"{key} needs data to evaluate: set val_set_size or test_datasets",
                )


def _field_is_for_completion(c: Config) -> Iterator[Conflict]:
    for section in ("datasets", "test_datasets"):
        for i, d in enumerate(getattr(c, section)):
            if d.field is not None and d.type != "completion":
                got = d.type if isinstance(d.type, str) else "a template" if d.type else "none"
                yield (f"{section}[{i}].field",), f"field goes with type: completion; got type: {got}"


_CHAT_KEYS = (
    *("chat_template", "chat_template_jinja", "field_messages", "message_property_mappings", "roles"),
    *("roles_to_train", "train_on_eos", "message_field_training", "field_tools"),
)


def _chat_keys_are_for_chats(c: Config) -> Iterator[Conflict]:
    for section in ("datasets", "test_datasets"):
        for i, d in enumerate(getattr(c, section)):
            at = f"{section}[{i}]"
            given = [k for k in _CHAT_KEYS if getattr(d, k) != DatasetKeys.model_fields[k].default]
            if given and d.type not in CHATS:
                yield (f"{at}.{given[0]}",), f"{given[0]} goes with type: {', '.join(CHATS)}"
            if (d.chat_template == "jinja") != (d.chat_template_jinja is not None):
                lone = "chat_template" if d.chat_template == "jinja" else "chat_template_jinja"
                keys = (f"{at}.{lone}",)
                yield keys, "chat_template: jinja and chat_template_jinja, its text, go together"


def _one_chat_template(c: Config) -> Iterator[Conflict]:
    entries = [
        (f"{name}[{i}]", d) for name in ("datasets", "test_datasets") for i, d in enumerate(getattr(c, name))
    ]
    chats = [(at, (d.chat_template, d.chat_template_jinja)) for at, d in entries if d.type in CHATS]
    for at, found in chats[1:]:
        if found != chats[0][1]:
            keys = (f"{at}.chat_template", f"{at}.chat_template_jinja", at)
            yield keys, f"{at} and {chats[0][0]} have other chat templates; a model is saved with one"


def _packed_or_grouped(c: Config) -> Iterator[Conflict]:
    if c.sample_packing and c.group_by_length:
        keys = ("sample_packing", "group_by_length")
        yield keys, "packed rows are all of one length; keep sample_packing or group_by_length"
    if c.eval_sample_packing and not c.sample_packing:
        keys = ("eval_sample_packing", "sample_packing")
        yield keys, "eval_sample_packing: true goes with sample_packing: true"


RULES: tuple[Callable[[Config], Iterator[Conflict]], ...] = (
    _bits_fit_adapter,
    _something_is_adapted,
    _new_tokens_are_trained,
    _one_precision,
    _steps_or_ratio,
    _strategy_fits_steps,
    _one_held_out_set,
    _field_is_for_completion,
    _chat_keys_are_for_chats,
    _one_chat_template,
    _packed_or_grouped,
)
