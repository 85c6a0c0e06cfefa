"""Rules between keys. Each yields the keys it is about and a sentence; load.py adds where they stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pyfastlora.trainer.config.adapter import AdapterKeys
from pyfastlora.trainer.config.data import DatasetKeys
from pyfastlora.trainer.config.engine import FsdpKeys
from pyfastlora.trainer.config.loggers import LoggerKeys
from pyfastlora.trainer.config.model import BnbKeys
from pyfastlora.trainer.config.optimisation import BNB_OPTIMIZERS
from pyfastlora.trainer.config.rules_training import RULES_OF_TRAINING, Conflict
from pyfastlora.trainer.config.schema import Config
from pyfastlora.trainer.data.registry import CHATS


def _bits_fit_adapter(c: Config) -> Iterator[Conflict]:
    keys = ("load_in_4bit", "adapter")
    if c.load_in_4bit and c.load_in_8bit:
        yield ("load_in_8bit", "load_in_4bit"), "load_in_4bit and load_in_8bit exclude each other; keep one"
    elif c.adapter == "qlora" and c.load_in_4bit is False:
        why = "adapter: qlora trains on 4-bit weights; remove load_in_4bit: false, or write adapter: lora"
        yield keys, why
    elif c.adapter != "qlora" and c.load_in_4bit:
        yield keys, f"load_in_4bit: true goes with adapter: qlora; got adapter: {c.adapter or 'nothing'}"
    elif c.adapter != "lora" and c.load_in_8bit:
        got = f"got adapter: {c.adapter or 'nothing'}"
        yield ("load_in_8bit", "adapter"), f"load_in_8bit: true goes with adapter: lora; {got}"
    if c.adapter != "qlora" and c.bnb_config_kwargs != BnbKeys():
        got = f"got adapter: {c.adapter or 'nothing'}"
        yield ("bnb_config_kwargs", "adapter"), f"bnb_config_kwargs goes with adapter: qlora; {got}"


def _something_is_adapted(c: Config) -> Iterator[Conflict]:
    if c.lora_model_dir is not None and c.adapter is not None:
        return  # its own configuration names the modules
    if c.adapter is None:
        for key in AdapterKeys.model_fields:
            if key != "fastlora" and getattr(c, key) != AdapterKeys.model_fields[key].default:
                yield (
                    (key, "adapter"),
                    f"{key} goes with adapter: lora or qlora; without one, the model is trained",
                )
        return
    if not c.lora_target_linear and not c.lora_target_modules:
        yield ("adapter",), "nothing to adapt: set lora_target_linear: true, or list lora_target_modules"
    if c.lora_target_linear and isinstance(c.lora_target_modules, str):
        yield (
            ("lora_target_modules", "lora_target_linear"),
            "lora_target_linear: true cannot be joined with a regular expression; keep one of the two",
        )


def _new_tokens_are_trained(c: Config) -> Iterator[Conflict]:
    trained = c.lora_modules_to_save or c.peft_trainable_token_indices or c.lora_model_dir
    if c.tokens and c.adapter and not trained:
        yield (
            ("tokens", "lora_modules_to_save"),
            "tokens adds rows to the embeddings, which nobody would train or save; "
            "add lora_modules_to_save: [embed_tokens, lm_head] (their names in Llama), or "
            "peft_trainable_token_indices: new",
        )
    if c.peft_trainable_token_indices == "new" and not c.tokens:
        yield (
            ("peft_trainable_token_indices", "tokens"),
            "peft_trainable_token_indices: new means the rows of `tokens`; name them, or list the rows",
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


def _the_best_is_evaluated(c: Config) -> Iterator[Conflict]:
    evaluates = (c.test_datasets or c.val_set_size) and c.eval_strategy != "no"
    for key, asked in (
        ("save_strategy", c.save_strategy == "best"),
        ("load_best_model_at_end", c.load_best_model_at_end),
        ("early_stopping_patience", c.early_stopping_patience),
    ):
        if asked and not evaluates:
            yield (
                (key,),
                f"{key} goes by the held-out loss; set val_set_size or test_datasets, and evaluate",
            )
    if c.load_best_model_at_end and c.save_strategy == "no":
        both = ("load_best_model_at_end", "save_strategy")
        yield both, "load_best_model_at_end chooses among checkpoints, and save_strategy: no saves none"


def _one_source_of_data(c: Config) -> Iterator[Conflict]:
    if not c.datasets and not c.pretraining_dataset:
        yield (
            ("datasets", "pretraining_dataset"),
            "datasets: nothing to train on; give datasets, or text as pretraining_dataset",
        )
    if c.datasets and c.pretraining_dataset:
        both = ("pretraining_dataset", "datasets")
        yield both, "datasets and pretraining_dataset are both trained on; keep one"


def _a_stream_has_no_length(c: Config) -> Iterator[Conflict]:
    if not c.pretraining_dataset:
        return
    stream = "pretraining_dataset, which is read as it is needed"
    if c.max_steps is None:
        yield ("max_steps", "pretraining_dataset"), f"max_steps is needed with {stream}"
    for key, instead in (
        ("val_set_size", "give test_datasets"),
        ("evals_per_epoch", "say eval_steps"),
        ("saves_per_epoch", "say save_steps"),
        ("dataset_shard_num", "give files of their own"),
        ("group_by_length", "say sample_packing: true"),
        ("train_sampling_strategy", "leave it out: samples are shuffled within a buffer"),
        ("dataloader_num_workers", "leave it out: batches are made on all cores already"),
    ):
        if getattr(c, key) != Config.model_fields[key].default:
            yield (key, "pretraining_dataset"), f"{key} does not go with {stream}; {instead}"


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
    for at, d in _entries(c):
        if d.field is not None and d.type != "completion":
            got = d.type if isinstance(d.type, str) else "a template" if d.type else "none"
            yield (f"{at}.field",), f"field goes with type: completion; got type: {got}"


_CHAT_KEYS = (
    *("chat_template", "chat_template_jinja", "field_messages", "message_property_mappings", "roles"),
    *("roles_to_train", "train_on_eos", "message_field_training", "field_tools"),
)


def _chat_keys_are_for_chats(c: Config) -> Iterator[Conflict]:
    for at, d in _entries(c):
        given = [k for k in _CHAT_KEYS if getattr(d, k) != DatasetKeys.model_fields[k].default]
        if given and d.type not in CHATS:
            yield (f"{at}.{given[0]}",), f"{given[0]} goes with type: {', '.join(CHATS)}"
    places: list[tuple[str, Config | DatasetKeys]] = [("", c), *((f"{at}.", d) for at, d in _entries(c))]
    for prefix, keys in places:
        if (keys.chat_template == "jinja") != (keys.chat_template_jinja is not None):
            lone = "chat_template" if keys.chat_template == "jinja" else "chat_template_jinja"
            yield (f"{prefix}{lone}",), "chat_template: jinja and chat_template_jinja, its text, go together"


def _one_chat_template(c: Config) -> Iterator[Conflict]:
    chats = [(at, c.with_template(d)) for at, d in _entries(c) if d.type in CHATS]
    found = [(at, (d.chat_template, d.chat_template_jinja)) for at, d in chats]
    for at, template in found[1:]:
        if template != found[0][1]:
            keys = (f"{at}.chat_template", f"{at}.chat_template_jinja", at)
            yield keys, f"{at} and {found[0][0]} have other chat templates; a model is saved with one"


def _shards_are_there(c: Config) -> Iterator[Conflict]:
    whole = ("dataset_shard_num", "dataset_shard_idx", c.dataset_shard_num, c.dataset_shard_idx)
    parts = [(f"{at}.shards", f"{at}.shards_idx", d.shards, d.shards_idx) for at, d in _entries(c)]
    for count_key, index_key, count, index in (whole, *parts):
        if index >= (count or 1):
            name = count_key.rpartition(".")[2]
            yield (
                (index_key,),
                f"{index_key} counts from 0 and must be less than {name} ({count or 1}); got {index}",
            )


def _entries(c: Config) -> list[tuple[str, DatasetKeys]]:
    """Every dataset, and where it stands."""
    sections = (("datasets", c.datasets), ("test_datasets", c.test_datasets))
    return [(f"{name}[{i}]", entry) for name, entries in sections for i, entry in enumerate(entries)]


def _packed_or_grouped(c: Config) -> Iterator[Conflict]:
    if c.sample_packing and c.sampling == "group_by_length":
        keys = ("sample_packing", "group_by_length", "train_sampling_strategy")
        yield keys, "packed rows are all of one length; keep sample_packing or group_by_length"
    for key, meant in (("group_by_length", "group_by_length"), ("shuffle_merged_datasets", "sequential")):
        asked = getattr(c, key) != Config.model_fields[key].default
        if asked and c.sampling != meant:
            yield (
                (key, "train_sampling_strategy"),
                f"{key} asks for {meant} order, another key for {c.sampling}",
            )
    if c.eval_sample_packing and not c.sample_packing:
        both = ("eval_sample_packing", "sample_packing")
        yield both, "eval_sample_packing: true goes with sample_packing: true"


def _a_run_has_one_name(c: Config) -> Iterator[Conflict]:
    if len(set(c.run_names.values())) > 1:
        keys = tuple(c.run_names)
        yield keys, f"{' and '.join(keys)} differ; a run has one name"


def _loggers_are_asked_for(c: Config) -> Iterator[Conflict]:
    off = {"wandb": c.wandb_mode == "disabled"}
    for name, way in (
        ("wandb", "wandb_project"),
        ("mlflow", "mlflow_experiment_name"),
        ("trackio", "trackio_project_name"),
    ):
        own = [k for k in LoggerKeys.model_fields if k.removeprefix("hf_").startswith(f"{name}_")]
        given = [key for key in own if getattr(c, key)]
        if given and name not in c.loggers and getattr(c, f"use_{name}") is None and not off.get(name):
            asks = f"use_{name}: true or {way}"
            yield (given[0], f"use_{name}"), f"{given[0]}: {name} is told nothing unless {asks} asks for it"


def _one_engine(c: Config) -> Iterator[Conflict]:
    if c.strategy and c.deepspeed:
        yield (
            ("deepspeed", "strategy"),
            "strategy and deepspeed both say what each process holds; keep one",
        )
    if c.fsdp_config != FsdpKeys() and not (c.strategy or "").startswith("fsdp2"):
        got = f"got strategy: {c.strategy or 'nothing'}"
        yield ("fsdp_config", "strategy"), f"fsdp_config goes with strategy: fsdp2; {got}"


def _quantised_weights_can_be_divided(c: Config) -> Iterator[Conflict]:
    strategy = c.strategy or (c.deepspeed if isinstance(c.deepspeed, str) else "")
    keys = ("strategy", "deepspeed", "adapter")
    if c.load_in_8bit and strategy.startswith(("fsdp2", "zero3")):
        yield (
            keys,
            f"{strategy} divides weights, 8-bit ones cannot be; use ddp, zero1 or zero2, or adapter: qlora",
        )
    if c.adapter == "qlora" and strategy.startswith("fsdp2"):
        b = c.bnb_config_kwargs
        stored, computed = b.bnb_4bit_quant_storage, b.bnb_4bit_compute_dtype
        if stored == "uint8" or stored != computed:
            yield (
                ("bnb_config_kwargs", "strategy"),
                f"{strategy} divides 4-bit weights as numbers of the compute dtype: set "
                "bnb_4bit_quant_storage and bnb_4bit_compute_dtype to one, such as bfloat16; "
                f"got {stored} and {computed or 'none'}",
            )
    if c.optimizer in BNB_OPTIMIZERS and strategy.startswith(("fsdp2", "zero3")):
        yield (
            ("optimizer", "strategy", "deepspeed"),
            f"optimizer: {c.optimizer} of bitsandbytes does not know divided weights ({strategy}); "
            "use adamw_torch_fused",
        )


RULES: tuple[Callable[[Config], Iterator[Conflict]], ...] = (
    _bits_fit_adapter,
    _something_is_adapted,
    _new_tokens_are_trained,
    _one_precision,
    _steps_or_ratio,
    _strategy_fits_steps,
    _the_best_is_evaluated,
    _one_source_of_data,
    _a_stream_has_no_length,
    _one_held_out_set,
    _field_is_for_completion,
    _chat_keys_are_for_chats,
    _one_chat_template,
    _shards_are_there,
    _packed_or_grouped,
    _a_run_has_one_name,
    _loggers_are_asked_for,
    _one_engine,
    _quantised_weights_can_be_divided,
    *RULES_OF_TRAINING,
)
