"""Datasets: what is trained on, what is held out, and how rows become samples."""

from __future__ import annotations

import reprlib
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationInfo, field_validator

from pyfastlora.trainer.config.values import Float, Int, Keys
from pyfastlora.trainer.data import template
from pyfastlora.trainer.data.registry import prompt_type_names


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


#: Of a tokenizer without a template, `tokenizer_default` is an error.
ChatTemplate = Literal["tokenizer_default", "tokenizer_default_fallback_chatml", "chatml", "jinja"]


class SourceKeys(Keys):
    """Where the rows of an entry of datasets, test_datasets or pretraining_dataset are."""

    path: str = Field(description="a file, a folder, or a dataset on the Hugging Face hub (owner/name)")
    ds_type: Literal["json", "csv", "parquet", "arrow", "text"] | None = Field(
        None, description="the format of the files, where their names do not tell"
    )
    data_files: str | list[str] | None = Field(None, description="files inside path (globs allowed)")
    name: str | None = Field(None, description="hub: the configuration of the dataset")
    split: str = Field("train", description="hub: the split")
    revision: str | None = Field(None, description="hub: branch, tag or commit")


class DatasetKeys(SourceKeys):
    """One entry of datasets or test_datasets."""

    type: NameOrTemplate | None = Field(
        None, description="how a row becomes text: a name, or a template; without it rows are token ids"
    )
    field: str | None = Field(None, description="completion: the field that holds the text (default: text)")
    shards: Int | None = Field(None, gt=0, description="take every so-manieth row")
    shards_idx: Int = Field(0, ge=0, description="which of the shards, from 0")
    weight: Float = Field(
        1.0, gt=0, description="how often an epoch has its samples: 2 twice, 0.5 half of them"
    )
    chat_template: ChatTemplate | None = Field(
        None, description="chats: the template (default: the top level's chat_template)"
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
            raise ValueError(f"must be one of {', '.join(prompt_type_names())}; got {reprlib.repr(value)}")
        return value


class PretrainingKeys(SourceKeys):
    """One entry of pretraining_dataset: text, trained on from its first token to its last."""

    type: Literal["pretrain", "completion"] = Field("pretrain", description="both mean plain text")
    text_column: str = Field("text", description="the field that holds the text")
    skip: Int = Field(0, ge=0, description="rows left out at the start")

    def as_dataset(self) -> DatasetKeys:
        """The entry of datasets that has the same samples."""
        source = {key: getattr(self, key) for key in SourceKeys.model_fields}
        return DatasetKeys(**source, type="completion", field=self.text_column)


def _as_list(value: Any) -> Any:
    """A path alone, or one entry alone, is a list of one."""
    if isinstance(value, str):
        return [{"path": value}]
    return [value] if isinstance(value, dict) else value


class DataKeys(Keys):
    """What is trained on and what is held out."""

    datasets: list[DatasetKeys] = Field([], description="trained on together, shuffled")
    pretraining_dataset: Annotated[list[PretrainingKeys], BeforeValidator(_as_list)] = Field(
        [], description="instead of datasets: text that is read as it is needed; a path alone will do"
    )
    streaming_multipack_buffer_size: Int = Field(
        10_000, gt=0, description="samples of pretraining_dataset that are shuffled and packed together"
    )
    test_datasets: list[DatasetKeys] = Field([], description="held out; instead of val_set_size")
    val_set_size: Float = Field(
        0.0, ge=0, description="held out of datasets: a share below 1, or a number of samples"
    )
    chat_template: ChatTemplate = Field("tokenizer_default", description="the template of chats")
    chat_template_jinja: str | None = Field(None, description="its text, of chat_template: jinja")
    dataset_shard_num: Int | None = Field(None, gt=0, description="train on every so-manieth sample")
    dataset_shard_idx: Int = Field(0, ge=0, description="which of these shards, from 0")
    dataset_prepared_path: str | None = Field(
        None, description="folder for prepared data (default: in the cache; FASTLORA_CACHE)"
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
    sample_packing_bin_size: Int | None = Field(
        None, gt=0, description="most samples to a row (default: any number)"
    )
    eval_sample_packing: bool | None = Field(
        None, description="the same for what is held out (default: as sample_packing)"
    )
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] | None = Field(
        None, description="order of the samples of an epoch (default: random)"
    )
    group_by_length: bool = Field(False, description="batch samples of similar length: less padding")
    shuffle_merged_datasets: bool = Field(True, description="false: train_sampling_strategy: sequential")
    dataloader_num_workers: Int = Field(0, ge=0, description="processes that build batches")
