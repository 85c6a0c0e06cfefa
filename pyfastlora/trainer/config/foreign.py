"""Axolotl's keys that are not honoured here, each with the reason.

Configurations carry many of them, mostly blank or false. Blank, false, 0 or empty is what happens anyway
and is accepted; any other value is refused with the reason below. EXPLAINED keys are accepted with a note,
because what they ask for happens by itself or changes nothing in the result.
"""

from __future__ import annotations

from typing import Any

_NOT_HERE = "not available; remove the key"
_ONE_PROCESS = "training runs in one process on one device; remove the key"
_NO_SERVICE = "metrics go to log.jsonl in output_dir, to no service; remove the key"
_ATTENTION = "say attn_implementation: {} instead"

REFUSED: dict[str, str] = {
    "max_packed_sequence_len": "say sequence_len and sample_packing: true",
    "load_in_8bit": "the base is dense (adapter: lora) or 4-bit (adapter: qlora)",
    "gptq": "the base is dense (adapter: lora) or 4-bit (adapter: qlora)",
    "lora_model_dir": "training starts from a fresh adapter; remove the key",
    "lora_fan_in_fan_out": "PEFT sets it from the layer; remove the key",
    "lora_on_cpu": _NOT_HERE,
    "relora": _NOT_HERE,
    "relora_steps": _NOT_HERE,
    "resume_from_checkpoint": "a run starts from step 0; remove the key",
    "auto_resume_from_checkpoints": "a run starts from step 0; remove the key",
    "early_stopping_patience": _NOT_HERE,
    "batch_size": "say micro_batch_size and gradient_accumulation_steps (batch_size is their product)",
    "pretraining_dataset": "give the text as datasets with type: completion",
    "chat_template": "say it of each of datasets, beside type: chat_template",
    "rl": _NOT_HERE,
    "plugins": _NOT_HERE,
    "torch_compile": _NOT_HERE,
    "deepspeed": _ONE_PROCESS,
    "fsdp": _ONE_PROCESS,
    "fsdp_config": _ONE_PROCESS,
    "local_rank": _ONE_PROCESS,
    "wandb_project": _NO_SERVICE,
    "wandb_entity": _NO_SERVICE,
    "wandb_watch": _NO_SERVICE,
    "wandb_name": _NO_SERVICE,
    "wandb_run_id": _NO_SERVICE,
    "wandb_log_model": _NO_SERVICE,
    "wandb_mode": _NO_SERVICE,
    "mlflow_tracking_uri": _NO_SERVICE,
    "use_tensorboard": _NO_SERVICE,
    "hub_model_id": "the adapter stays in output_dir; push it with `hf upload` afterwards",
    "push_dataset_to_hub": _NOT_HERE,
    "flash_attention": _ATTENTION.format("flash_attention_2"),
    "flex_attention": _ATTENTION.format("flex_attention"),
    "sdp_attention": _ATTENTION.format("sdpa"),
    "eager_attention": _ATTENTION.format("eager"),
    "xformers_attention": "sdpa chooses the best kernel of torch: say attn_implementation: sdpa",
    "s2_attention": _NOT_HERE,
    "debug": _NOT_HERE,
}

_KERNELS = "every adapted linear is fused where it can be; see the kernel report"
_PACKING = "all samples are packed at once, and counted: nothing has to be estimated"
_CLASS = "the class is read from the files of base_model"

EXPLAINED: dict[str, str] = {
    "lora_mlp_kernel": _KERNELS,
    "lora_qkv_kernel": _KERNELS,
    "lora_o_kernel": _KERNELS,
    "lora_embedding_kernel": "embeddings run PEFT's forward",
    "dataset_prepared_path": "data is tokenised anew for each run; nothing is kept there",
    "dataset_processes": "tokenising uses all cores",
    "dataset_num_proc": "tokenising uses all cores",
    "model_type": _CLASS,
    "tokenizer_type": _CLASS,
    "is_llama_derived_model": _CLASS,
    "is_mistral_derived_model": _CLASS,
    "is_falcon_derived_model": _CLASS,
    "sample_packing_eff_est": _PACKING,
    "total_num_tokens": _PACKING,
    "sample_packing_group_size": _PACKING,
    "sample_packing_bin_size": _PACKING,
    "save_safetensors": "adapters are saved as safetensors",
}


def is_off(value: Any) -> bool:
    """Whether a value asks for nothing."""
    return value in (None, False, 0, "", [], {}) or (
        isinstance(value, str) and value.lower() in ("no", "off", "false")
    )
