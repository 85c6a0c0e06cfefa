"""What `fastlora train` can be asked to do: the keys of the YAML, their types, defaults and meaning.

The names are Axolotl's. A key has one of three fates: it is a field below and honoured; it is listed in
config_foreign.py and refused or explained; or it is unknown and refused. Nothing is ignored in silence.

The schema is flat, as the file is; the classes group the fields by subject, in the order of a typical file.
config_load.py reads files and words the errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
)

from pyfastlora.trainer.data import template
from pyfastlora.trainer.data.registry import CHATS, prompt_type_names


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):  # Python would take true for 1
        raise ValueError("must be a number; got true" if value else "must be a number; got false")
    return value


Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]


class Keys(BaseModel):
    """Base of every group: unknown keys are errors, values are fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class SpecialTokens(Keys):
    """special_tokens: the roles to (re)assign, each to one token."""

    bos_token: str | None = Field(default=None, description="opens a text")
    eos_token: str | None = Field(default=None, description="ends a response")
    pad_token: str | None = Field(default=None, description="fills a batch up")
    unk_token: str | None = Field(default=None, description="stands for what has no token")


class BnbKeys(Keys):
    """bnb_config_kwargs: how bitsandbytes stores the 4-bit base."""

    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field(
        default="nf4", description="the 16 values a weight can have"
    )
    bnb_4bit_use_double_quant: bool = Field(default=True, description="the scales in 8 bits too")
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="of matrix products (default: that of the base)"
    )
    bnb_4bit_quant_storage: Literal["uint8", "float32", "bfloat16", "float16"] = Field(
        default="uint8", description="dtype of the tensor that holds the packed weights"
    )


class CheckpointingKeys(Keys):
    """gradient_checkpointing_kwargs."""

    use_reentrant: bool = Field(default=False, description="torch's older kind of checkpointing")


class TemplateKeys(Keys):
    """A dataset's type as a template of its own."""

    field_instruction: str = Field("instruction", description="the field of the instruction")
    field_input: str = Field("input", description="the field of its input, where a row has one")
    field_output: str = Field("output", description="the field of the response")
    field_system: str | None = Field(None, description="the field of the system text, if rows have one")
    system_prompt: str = Field("", description="the system text of rows without one")
    system_format: str = Field("{system}", description="how the system text is written, before the rest")
    format: str = Field("{instruction} {input}", description="the prompt, of {instruction} and {input}")
    no_input_format: str | None = Field(None, description="the same of rows without input (default: format)")

    @field_validator("system_format", "format", "no_input_format")
    @classmethod
    def _can_be_filled_in(cls, value: str | None, info: ValidationInfo) -> str | None:
        names = ("system",) if info.field_name == "system_format" else ("instruction", "input")
        reason = None if value is None else template.why_not(value, names)
        if reason is not None:
            raise ValueError(reason)
        return value


def _name_or_template(value: Any) -> str:
    return "template" if isinstance(value, dict | TemplateKeys) else "name"


#: Apart, so that a mistake in a template is told as one of a template.
NameOrTemplate = Annotated[
    Annotated[str, Tag("name")] | Annotated[TemplateKeys, Tag("template")], Discriminator(_name_or_template)
]


class DatasetKeys(Keys):
    """One entry of datasets or test_datasets."""

    path: str = Field(description="a file, a folder, or a dataset on the Hugging Face hub (owner/name)")
    type: NameOrTemplate | None = Field(
        None, description="how a row becomes text: a name, or a template; without it rows are token ids"
    )
    field: str | None = Field(None, description="completion: the field that holds the text (default: text)")
    ds_type: Literal["json", "csv", "parquet", "arrow", "text"] | None = Field(
        None, description="the format of the files, where their names do not tell"
    )
    data_files: str | list[str] | None = Field(None, description="files inside path (globs allowed)")
    name: str | None = Field(None, description="hub: the configuration of the dataset")
    split: str = Field("train", description="hub: the split")
    revision: str | None = Field(None, description="hub: branch, tag or commit")
    chat_template: Literal["tokenizer_default", "chatml", "jinja"] = Field(
        "tokenizer_default", description="chats: the template"
    )
    chat_template_jinja: str | None = Field(None, description="chats: its text, of chat_template: jinja")
    field_messages: str | None = Field(
        None, description="chats: the field of the messages (messages; sharegpt: conversations)"
    )
    message_property_mappings: dict[Literal["role", "content"], str] = Field(
        {}, description="chats: what a message calls its role and content (sharegpt: from, value)"
    )
    roles: dict[str, list[str]] | None = Field(None, description="chats: the names that each role goes by")
    roles_to_train: list[str] = Field(["assistant"], description="chats: whose messages are trained on")
    train_on_eos: Literal["turn", "all", "last", "none"] = Field(
        "turn", description="chats: the end tokens trained on: of trained turns, of all, of the last, none"
    )
    message_field_training: str | None = Field(
        None, description="chats: a field of messages, true or false, that decides instead"
    )
    field_tools: str | None = Field(
        None, description="chats: the field of the tools, for templates with tools"
    )

    @field_validator("type")
    @classmethod
    def _known_type(cls, value: str | TemplateKeys | None) -> str | TemplateKeys | None:
        if isinstance(value, str) and value not in prompt_type_names():
            raise ValueError(f"must be one of {', '.join(prompt_type_names())}; got {value!r}")
        return value


class ModelKeys(Keys):
    """The base model, its tokenizer and how its weights are held."""

    base_model: str = Field(description="a folder, or a model on the Hugging Face hub")
    revision_of_model: str | None = Field(None, description="hub: branch, tag or commit of base_model")
    tokenizer_config: str | None = Field(None, description="where the tokenizer is, if not with base_model")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    special_tokens: SpecialTokens = Field(SpecialTokens(), description="roles to (re)assign")
    tokens: list[str] = Field([], description="tokens to add; their embeddings must be trained and saved")
    attn_implementation: (
        Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None
    ) = Field(None, description="attention of transformers (default: its own choice)")
    load_in_4bit: bool | None = Field(None, description="bitsandbytes 4-bit base; implied by adapter: qlora")
    bnb_config_kwargs: BnbKeys = Field(BnbKeys(), description="details of the 4-bit base")
    bf16: bool | Literal["auto", "full"] = Field(
        "auto", description="true: bf16 base, fp32 adapter, autocast; full: all bf16; auto: true where fast"
    )
    fp16: bool = Field(False, description="the same with float16; needs a GPU")
    tf32: bool | Literal["auto"] = Field(
        "auto", description="TensorFloat-32 for fp32 matrix products on a GPU"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations to save memory")
    gradient_checkpointing_kwargs: CheckpointingKeys = Field(
        CheckpointingKeys(), description="how it is done"
    )


class AdapterKeys(Keys):
    """The adapter, as PEFT's LoraConfig understands it."""

    adapter: Literal["lora", "qlora"] = Field(description="lora: dense base; qlora: 4-bit base")
    lora_r: Int = Field(8, gt=0, description="rank of A and B")
    lora_alpha: Float = Field(8.0, gt=0, description="scaling is lora_alpha / lora_r")
    lora_dropout: Float = Field(0.0, ge=0, lt=1, description="probability, on the input of A")
    lora_target_modules: list[str] | str | None = Field(
        None, description="names of linear modules (ends of their full names), or one regular expression"
    )
    lora_target_linear: bool = Field(False, description="every linear module but the output head")
    lora_modules_to_save: list[str] = Field(
        [], description="modules trained whole and saved beside the adapter"
    )
    peft_use_dora: bool = Field(False, description="DoRA: learn the magnitude of each output separately")
    peft_use_rslora: bool = Field(False, description="scaling is lora_alpha / sqrt(lora_r)")
    fastlora: bool = Field(True, description="false: PEFT's own forward, for comparison")


class DataKeys(Keys):
    """What is trained on and what is held out."""

    datasets: list[DatasetKeys] = Field(min_length=1, description="trained on together, shuffled")
    test_datasets: list[DatasetKeys] = Field([], description="held out; instead of val_set_size")
    val_set_size: Float = Field(
        0.0, ge=0, description="held out of datasets: a share below 1, or a number of samples"
    )
    sequence_len: Int = Field(512, gt=1, description="longest sample, in tokens")
    excess_length_strategy: Literal["drop", "truncate", "raise"] = Field(
        "drop", description="what happens to a longer one; completion is split instead"
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="what happens to a row that does not fit its type; skipped ones are counted"
    )
    train_on_inputs: bool = Field(False, description="true: the prompt is trained on as well")
    pad_to_sequence_len: bool = Field(
        False, description="true: pad to sequence_len, not to the longest of the batch"
    )
    sample_packing: bool | Literal["auto"] = Field(
        False, description="several samples to a row of sequence_len; auto: if the model keeps them apart"
    )
    eval_sample_packing: bool | None = Field(
        None, description="the same for what is held out (default: as sample_packing)"
    )
    group_by_length: bool = Field(False, description="batch samples of similar length: less padding")
    dataloader_num_workers: Int = Field(0, ge=0, description="processes that build batches")


TORCH_OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop")
BNB_OPTIMIZERS = (
    *("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit"),
    *("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
    *("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"),
    *("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
)
SCHEDULERS = (
    *("cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "cosine_with_min_lr"),
    *("polynomial", "inverse_sqrt", "warmup_stable_decay"),
)


class OptimisationKeys(Keys):
    """Batches, steps, optimizer and learning rate."""

    micro_batch_size: Int = Field(1, gt=0, description="samples per forward pass and device")
    gradient_accumulation_steps: Int = Field(
        1, gt=0, description="forward passes per step, averaged over tokens"
    )
    eval_batch_size: Int | None = Field(
        None, gt=0, description="samples per evaluation pass (micro_batch_size)"
    )
    num_epochs: Float = Field(1.0, gt=0, description="passes over the training data")
    max_steps: Int | None = Field(None, gt=0, description="optimizer steps; instead of num_epochs")
    learning_rate: Float = Field(gt=0, description="peak learning rate")
    optimizer: str = Field("adamw_torch_fused", description="by transformers' name")
    lr_scheduler: str = Field("cosine", description="by transformers' name")
    lr_scheduler_kwargs: dict[str, Any] = Field({}, description="arguments of the scheduler")
    warmup_steps: Int | None = Field(None, ge=0, description="steps of linear warm-up")
    warmup_ratio: Float | None = Field(None, ge=0, lt=1, description="the same as a share of all steps")
    weight_decay: Float = Field(0.0, ge=0, description="of the optimizer")
    max_grad_norm: Float = Field(1.0, ge=0, description="gradient clipping; 0: none")
    adam_beta1: Float = Field(0.9, ge=0, lt=1, description="decay of the mean of gradients")
    adam_beta2: Float = Field(0.999, ge=0, lt=1, description="decay of the mean of their squares")
    adam_epsilon: Float = Field(1e-8, gt=0, description="added to the square root")
    neftune_noise_alpha: Float | None = Field(None, gt=0, description="noise on the input embeddings")

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, value: str) -> str:
        return _one_of(
            value,
            TORCH_OPTIMIZERS + BNB_OPTIMIZERS,
            {"adamw_hf": "adamw_torch", "adamw_apex_fused": "adamw_torch_fused"},
        )

    @field_validator("lr_scheduler")
    @classmethod
    def _known_scheduler(cls, value: str) -> str:
        return _one_of(value, SCHEDULERS, {})


class RunKeys(Keys):
    """Where the run goes, what it reports and how often."""

    output_dir: str = Field("./model-out", min_length=1, description="a new or empty folder")
    seed: Int = Field(42, ge=0, description="of adapter, data order and dropout")
    logging_steps: Int = Field(1, gt=0, description="steps between two lines of log.jsonl")
    eval_strategy: Literal["no", "epoch", "steps"] | None = Field(None, description="default: epoch")
    eval_steps: Int | None = Field(None, gt=0, description="steps between two evaluations")
    evals_per_epoch: Int | None = Field(None, gt=0, description="the same as a count")
    eval_on_start: bool = Field(False, description="evaluate before the first step too")
    save_strategy: Literal["no", "epoch", "steps"] | None = Field(None, description="default: epoch")
    save_steps: Int | None = Field(None, gt=0, description="steps between two checkpoints")
    saves_per_epoch: Int | None = Field(None, gt=0, description="the same as a count")
    save_total_limit: Int | None = Field(None, gt=0, description="checkpoints kept")
    strict: bool = Field(True, description="false: an unknown key is a warning, not an error")


class Config(
    RunKeys, OptimisationKeys, DataKeys, AdapterKeys, ModelKeys
):  # pydantic lists the last one first
    """A whole configuration file."""

    @property
    def quantised(self) -> bool:
        """Whether the base is held in 4 bits."""
        return self.adapter == "qlora"


def _one_of(value: str, allowed: tuple[str, ...], gone: dict[str, str]) -> str:
    if value in gone:
        raise ValueError(f"{value!r} no longer exists; {gone[value]} takes its place")
    if value not in allowed:
        raise ValueError(f"must be one of {', '.join(allowed)}; got {value!r}")
    return value


# Rules between keys. Each yields the keys it is about and a sentence; config_load.py adds where they stand.
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
