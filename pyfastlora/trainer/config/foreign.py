"""Axolotl's keys that are none of ours, and what becomes of each: translated, noted or refused.

Configurations carry many of them, mostly blank or false. Blank, false, 0 or empty is what happens anyway and
is accepted. A Translation is another name for a key of ours; a Note says why the key changes nothing in the
result; a Refusal, why what it asks for cannot be had, and what to write instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Translation:
    """The key says what `key` says: with `value`, or what it makes of the value, where there is one."""

    key: str
    value: Any = None

    def value_of(self, written: Any) -> Any:
        if callable(self.value):
            return self.value(written)
        return written if self.value is None else self.value


@dataclass(frozen=True, slots=True)
class Note:
    """The key is accepted; the sentence says why it changes nothing."""

    sentence: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """The key is an error; the sentence says why, and what to write instead."""

    sentence: str


Fate = Translation | Note | Refusal


def _fsdp(options: Any) -> str:
    """FSDP1's list of options, such as [full_shard, auto_wrap, offload]."""
    words = set(options.split() if isinstance(options, str) else options)
    if "no_shard" in words:
        return "ddp"
    return "fsdp2_offload" if "offload" in words else "fsdp2"


_NOT_HERE = Refusal("not available; remove the key")
_ONE_AXIS = Refusal("processes share samples and weights (strategy), not a sequence or a product; remove it")
_NO_SERVICE = Refusal("those that can be told are TensorBoard, wandb, MLflow and Trackio; remove the key")
_ANSWERS = Refusal("report.html has answers to report_samples held-out prompts; say that")
_SFT = Refusal("trained is on texts and responses (SFT); remove the key")
_ANNEAL = Refusal("the learning rate falls with its schedule; remove the key")
_GPTQ = Refusal("the base is dense, 8-bit (load_in_8bit) or 4-bit (adapter: qlora)")
_GONE = Refusal("it is gone from Axolotl and transformers; remove the key")

_ATTENTION = "attn_implementation"
_KERNELS = Note("every adapted linear is fused where it can be; see the kernel report")
_PACKING = Note("all samples are packed at once, and counted: nothing has to be estimated")
_CLASS = Note("the class is read from the files of base_model")
_CORES = Note("tokenising uses all cores")
_LOGIN = Note("the token of `hf auth login` is used where the hub asks for one")
_WHOLE = Refusal("messages reach the template whole; name the field as the template does")
_LOSS = Note("the loss is transformers' own")

FOREIGN: dict[str, Fate] = {
    # other names
    "noisy_embedding_alpha": Translation("neftune_noise_alpha"),
    "model_revision": Translation("revision_of_model"),
    "bfloat16": Translation("bf16", "full"),
    "flash_attention": Translation(_ATTENTION, "flash_attention_2"),
    "flex_attention": Translation(_ATTENTION, "flex_attention"),
    "sdp_attention": Translation(_ATTENTION, "sdpa"),
    "eager_attention": Translation(_ATTENTION, "eager"),
    "xformers_attention": Translation(_ATTENTION, "sdpa"),
    "model_config": Translation("overrides_of_model_config"),
    "rope_scaling": Translation("overrides_of_model_config", lambda value: {"rope_scaling": value}),
    "activation_checkpointing": Translation("gradient_checkpointing"),
    "activation_checkpointing_kwargs": Translation("gradient_checkpointing_kwargs"),
    "relora_warmup_steps": Translation("jagged_restart_warmup_steps"),
    # the model
    "base_model_config": Note("the configuration is read from the files of base_model"),
    "base_model_ignore_patterns": Note("only the files that are needed are read"),
    "model_type": _CLASS,
    "tokenizer_type": _CLASS,
    "tokenizer_use_fast": Note("the fast tokenizer is used where there is one"),
    "tokenizer_legacy": Note("what the tokenizer's own files say holds"),
    "is_llama_derived_model": _CLASS,
    "is_mistral_derived_model": _CLASS,
    "is_qwen_derived_model": _CLASS,
    "is_falcon_derived_model": _CLASS,
    "gptq": _GPTQ,
    "gptq_groupsize": _GPTQ,
    "gptq_model_v1": _GPTQ,
    "gptq_disable_exllama": _GPTQ,
    "overrides_of_model_kwargs": _NOT_HERE,
    "float16": Refusal("float16 adapters lose their small gradients; say fp16: true, which scales them"),
    "gpu_memory_limit": _NOT_HERE,
    "lora_on_cpu": _NOT_HERE,
    "max_memory": Refusal("the model goes to one device; remove the key"),
    "device_map": Refusal("the model goes to one device; remove the key"),
    "s2_attention": _GONE,
    "sage_attention": _NOT_HERE,
    "landmark_attention": _GONE,
    "xpos_rope": _GONE,
    "flash_optimum": _GONE,
    "better_transformer": _GONE,
    "flash_attn_cross_entropy": _LOSS,
    "flash_attn_rms_norm": Note("the norms are the model's own"),
    "flash_attn_fuse_qkv": _KERNELS,
    "flash_attn_fuse_mlp": _KERNELS,
    # the adapter
    "lora_mlp_kernel": _KERNELS,
    "lora_qkv_kernel": _KERNELS,
    "lora_o_kernel": _KERNELS,
    "lora_embedding_kernel": _KERNELS,
    "lora_fan_in_fan_out": Note("PEFT sees from the layer which way its weight lies"),
    "lora_out_dir": Refusal("the adapter is saved in output_dir; say that"),
    "relora_anneal_steps": _ANNEAL,
    "jagged_restart_anneal_steps": _ANNEAL,
    "relora_cpu_offload": Note("what was merged is kept in CPU memory anyway"),
    "peft": Refusal(
        "say peft_init_lora_weights: loftq for LoftQ; make others with PEFT, and give them as lora_model_dir"
    ),
    "peft_layer_replication": Refusal("make the adapter with PEFT, and give it as lora_model_dir"),
    # the data
    "dataset_processes": _CORES,
    "dataset_num_proc": _CORES,
    "dataset_keep_in_memory": Note("prepared data stays on disk and is mapped into memory"),
    "push_dataset_to_hub": _NOT_HERE,
    "hf_use_auth_token": _LOGIN,
    "max_packed_sequence_len": Refusal("say sequence_len and sample_packing: true"),
    "sample_packing_eff_est": _PACKING,
    "total_num_tokens": _PACKING,
    "sample_packing_group_size": _PACKING,
    "sample_packing_sequentially": _PACKING,
    "streaming": Note("what is prepared stays on disk; only pretraining_dataset is never prepared"),
    "pretrain_multipack_buffer_size": Translation("streaming_multipack_buffer_size"),
    "pretrain_multipack_attn": Note("packed samples never see one another"),
    "eot_tokens": Note("the tokens that end a turn are read off what the template writes"),
    "default_system_message": Refusal("put a system message into the rows, or into chat_template_jinja"),
    "rl": _SFT,
    "reward_model": _SFT,
    "process_reward_model": _SFT,
    "kd_trainer": _SFT,
    # batches and steps
    "batch_size": Refusal(
        "say micro_batch_size and gradient_accumulation_steps (batch_size is their product)"
    ),
    "curriculum_sampling": _NOT_HERE,
    "torchdistx_path": _GONE,
    "optim_target_modules": _NOT_HERE,
    "unfrozen_parameters": _NOT_HERE,
    "lisa_n_layers": _NOT_HERE,
    "lisa_step_interval": _NOT_HERE,
    "lisa_layers_attribute": _NOT_HERE,
    "activation_offloading": _NOT_HERE,
    "layer_offloading": _NOT_HERE,
    "tiled_mlp": _NOT_HERE,
    "plugins": _NOT_HERE,
    # engines
    "fsdp": Translation("strategy", _fsdp),
    "fsdp_version": Note("strategy: fsdp2 is torch's fully_shard, whatever version is asked for"),
    "local_rank": Note("whoever starts the processes tells each of them"),
    "ddp": Translation("strategy", "ddp"),
    "context_parallel_size": _ONE_AXIS,
    "sequence_parallel_degree": _ONE_AXIS,
    "tensor_parallel_size": _ONE_AXIS,
    "use_ray": Refusal("start with `fastlora train --nproc`, torchrun, accelerate, deepspeed or srun"),
    # the run
    "save_safetensors": Note("weights are saved as safetensors"),
    "save_only_model": _NOT_HERE,
    "debug": Note("`fastlora preprocess --show` prints what is trained on"),
    "eval_table_size": _ANSWERS,
    "eval_causal_lm_metrics": _NOT_HERE,
    "eval_table_max_new_tokens": _ANSWERS,
    "eval_max_new_tokens": _ANSWERS,
    "use_comet": _NO_SERVICE,
    "comet_project_name": _NO_SERVICE,
    "hub_model_id": Refusal("the adapter stays in output_dir; push it with `hf upload` afterwards"),
    "hub_strategy": Refusal("the adapter stays in output_dir; push it with `hf upload` afterwards"),
}

#: Where the entries stand that FOREIGN_OF_DATASETS is about.
SECTIONS = ("datasets", "test_datasets", "pretraining_dataset")
FOREIGN_OF_DATASETS: dict[str, Fate] = {
    "train_on_split": Translation("split"),
    "conversation": Refusal("say chat_template: chatml, or chat_template: jinja and its text"),
    "field_human": Refusal("say field_instruction in a template (type: {..})"),
    "field_model": Refusal("say field_output in a template (type: {..})"),
    "train_on_eot": Translation("train_on_eos"),
    "message_field_training_detail": Refusal("say by message (message_field_training), or give segments"),
    "drop_system_message": Refusal("leave the system messages out of the rows, or of chat_template_jinja"),
    "field_thinking": _WHOLE,
    "template_thinking_key": _WHOLE,
    "split_thinking": Refusal("put what was thought into a field of the message that the template knows"),
    "logprobs_field": _SFT,
    "temperature": _SFT,
    "message_field_role": Refusal("say message_property_mappings: {role: ..}"),
    "message_field_content": Refusal("say message_property_mappings: {content: ..}"),
    "trust_remote_code": Refusal("datasets runs no code of a dataset any more; remove the key"),
    "preprocess_shards": _CORES,
    "input_format": _GONE,
    "input_transform": _GONE,
}


def is_off(value: Any) -> bool:
    """Whether a value asks for nothing."""
    return value in (None, False, 0, "", [], {}) or (
        isinstance(value, str) and value.lower() in ("no", "off", "false")
    )
