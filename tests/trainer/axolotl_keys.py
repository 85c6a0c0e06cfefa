"""Axolotl's keys and what becomes of each here: honoured, translated, noted or refused.

OLD has every key of the option reference in Axolotl's README of 2023 and 2024, in its order; TODAY the keys
of its schema (0.21) that concern LoRA and full fine-tuning and came later; OF_DATASETS those of an entry of
datasets, of either. A value is one that asks for something.
"""

from __future__ import annotations

OLD = """
base_model                    ./model               honoured
base_model_ignore_patterns    "*.bin"               noted
base_model_config             ./model               noted
revision_of_model             main                  honoured
model_revision                main                  translated revision_of_model
tokenizer_config              ./tok                 honoured
model_type                    LlamaForCausalLM      noted
tokenizer_type                AutoTokenizer         noted
trust_remote_code             true                  honoured
tokenizer_use_fast            true                  noted
tokenizer_legacy              true                  noted
resize_token_embeddings_to_32x true                 honoured
is_falcon_derived_model       true                  noted
is_llama_derived_model        true                  noted
is_mistral_derived_model      true                  noted
is_qwen_derived_model         true                  noted
overrides_of_model_config     {a: 1}                honoured
rope_scaling                  {type: linear}        translated overrides_of_model_config
bnb_config_kwargs             {bnb_4bit_quant_type: fp4} honoured
gptq                          true                  refused
gptq_groupsize                128                   refused
gptq_model_v1                 true                  refused
load_in_8bit                  true                  honoured
load_in_4bit                  true                  honoured
bf16                          true                  honoured
fp16                          true                  honoured
tf32                          true                  honoured
bfloat16                      true                  translated bf16
float16                       true                  refused
gpu_memory_limit              20GiB                 refused
lora_on_cpu                   true                  refused
datasets                      [{path: a}]           honoured
shuffle_merged_datasets       true                  honoured
test_datasets                 [{path: a}]           honoured
rl                            dpo                   refused
dataset_prepared_path         ./prepared            honoured
push_dataset_to_hub           me/data               refused
dataset_processes             4                     noted
dataset_keep_in_memory        true                  noted
hub_model_id                  me/model              refused
hub_strategy                  end                   refused
hf_use_auth_token             true                  noted
val_set_size                  0.1                   honoured
dataset_shard_num             4                     honoured
dataset_shard_idx             1                     honoured
sequence_len                  2048                  honoured
pad_to_sequence_len           true                  honoured
max_packed_sequence_len       2048                  refused
sample_packing                true                  honoured
eval_sample_packing           true                  honoured
sample_packing_eff_est        0.9                   noted
total_num_tokens              1000                  noted
sample_packing_group_size     1000                  noted
sample_packing_bin_size       200                   honoured
device_map                    auto                  refused
max_memory                    {cpu: 20GiB}          refused
adapter                       lora                  honoured
lora_model_dir                ./adapter             honoured
lora_r                        8                     honoured
lora_alpha                    16                    honoured
lora_dropout                  0.05                  honoured
lora_target_modules           [q_proj]              honoured
lora_target_linear            true                  honoured
peft_layers_to_transform      [1]                   honoured
lora_modules_to_save          [lm_head]             honoured
lora_out_dir                  ./out                 refused
lora_fan_in_fan_out           true                  noted
peft                          {loftq_config: {}}    refused
relora_steps                  100                   honoured
relora_warmup_steps           10                    translated jagged_restart_warmup_steps
relora_anneal_steps           10                    refused
relora_prune_ratio            0.9                   honoured
relora_cpu_offload            true                  noted
wandb_mode                    offline               honoured
wandb_project                 p                     honoured
wandb_entity                  e                     honoured
wandb_watch                   gradients             honoured
wandb_name                    n                     honoured
wandb_run_id                  r                     honoured
wandb_log_model               end                   honoured
mlflow_tracking_uri           uri                   honoured
mlflow_experiment_name        n                     honoured
output_dir                    ./out                 honoured
torch_compile                 true                  honoured
torch_compile_backend         inductor              honoured
gradient_accumulation_steps   4                     honoured
micro_batch_size              2                     honoured
batch_size                    8                     refused
eval_batch_size               2                     honoured
num_epochs                    3                     honoured
warmup_steps                  10                    honoured
warmup_ratio                  0.05                  honoured
learning_rate                 1e-4                  honoured
lr_quadratic_warmup           true                  honoured
logging_steps                 10                    honoured
eval_steps                    10                    honoured
evals_per_epoch               2                     honoured
save_strategy                 epoch                 honoured
save_steps                    10                    honoured
saves_per_epoch               2                     honoured
save_total_limit              2                     honoured
max_steps                     100                   honoured
eval_table_size               5                     refused
eval_max_new_tokens           128                   refused
eval_table_max_new_tokens     128                   refused
eval_causal_lm_metrics        [sacrebleu]           refused
loss_watchdog_threshold       5.0                   honoured
loss_watchdog_patience        3                     honoured
save_safetensors              true                  noted
train_on_inputs               true                  honoured
group_by_length               true                  honoured
gradient_checkpointing        true                  honoured
gradient_checkpointing_kwargs {use_reentrant: true} honoured
early_stopping_patience       3                     honoured
lr_scheduler                  cosine                honoured
lr_scheduler_kwargs           {a: 1}                honoured
cosine_min_lr_ratio           0.1                   honoured
cosine_constant_lr_ratio      0.8                   honoured
lr_div_factor                 10                    honoured
log_sweep_min_lr              1e-5                  honoured
log_sweep_max_lr              1e-3                  honoured
optimizer                     adamw_torch           honoured
optim_args                    {a: 1}                honoured
optim_target_modules          [attn]                refused
weight_decay                  0.01                  honoured
adam_beta1                    0.9                   honoured
adam_beta2                    0.95                  honoured
adam_epsilon                  1e-8                  honoured
max_grad_norm                 1.0                   honoured
noisy_embedding_alpha         5                     translated neftune_noise_alpha
neftune_noise_alpha           5                     honoured
flash_optimum                 true                  refused
xformers_attention            true                  translated attn_implementation
flash_attention               true                  translated attn_implementation
flash_attn_cross_entropy      true                  noted
flash_attn_rms_norm           true                  noted
flash_attn_fuse_qkv           true                  noted
flash_attn_fuse_mlp           true                  noted
sdp_attention                 true                  translated attn_implementation
s2_attention                  true                  refused
landmark_attention            true                  refused
xpos_rope                     true                  refused
resume_from_checkpoint        ./out/checkpoint-10   honoured
auto_resume_from_checkpoints  true                  honoured
local_rank                    1                   noted
special_tokens                {pad_token: x}        honoured
tokens                        [x]                   honoured
fsdp                          [full_shard]        translated strategy
fsdp_config                   {fsdp_offload_params: true} honoured
deepspeed                     zero2               honoured
ddp_timeout                   600                 honoured
ddp_bucket_cap_mb             25                  honoured
ddp_broadcast_buffers         true                honoured
torchdistx_path               ./x                   refused
pretraining_dataset           me/text               honoured
debug                         true                  noted
seed                          1                     honoured
strict                        true                  honoured
"""

TODAY = """
base_config                   other.yaml            honoured
chat_template                 chatml                honoured
chat_template_jinja           "{{ messages }}"      honoured
default_system_message        hello                 refused
attn_implementation           sdpa                  honoured
eager_attention               true                  translated attn_implementation
flex_attention                true                  translated attn_implementation
sage_attention                true                  refused
excess_length_strategy        truncate              honoured
dataset_num_proc              4                     noted
dataloader_num_workers        2                     honoured
sample_packing_sequentially   true                  noted
curriculum_sampling           true                  refused
peft_use_dora                 true                  honoured
peft_use_rslora               true                  honoured
peft_init_lora_weights        pissa                 honoured
peft_layer_replication        [[0, 4]]              refused
loraplus_lr_ratio             16                    honoured
loraplus_lr_embedding         1e-6                  honoured
streaming                     true                  noted
streaming_multipack_buffer_size 5000                honoured
pretrain_multipack_buffer_size 5000                 translated streaming_multipack_buffer_size
pretrain_multipack_attn       true                  noted
lora_mlp_kernel               true                  noted
lora_qkv_kernel               true                  noted
lora_o_kernel                 true                  noted
lora_embedding_kernel         true                  noted
relora                        true                  honoured
jagged_restart_steps          100                   honoured
jagged_restart_warmup_steps   10                    honoured
jagged_restart_anneal_steps   10                    refused
lr_groups                     [{name: a, modules: [q], lr: 1e-4}] honoured
embedding_lr                  1e-5                  honoured
embedding_lr_scale            0.1                   honoured
peft_trainable_token_indices  [1, 2]                honoured
activation_checkpointing      true                  translated gradient_checkpointing
eval_strategy                 steps                 honoured
eval_on_start                 true                  honoured
save_only_model               true                  refused
torch_compile_mode            default               honoured
unfrozen_parameters           [x]                   refused
lisa_n_layers                 4                     refused
lisa_step_interval            20                    refused
lisa_layers_attribute         model.layers          refused
activation_offloading         true                  refused
layer_offloading              true                  refused
tiled_mlp                     true                  refused
plugins                       [x]                   refused
reward_model                  true                  refused
process_reward_model          true                  refused
kd_trainer                    true                  refused
fsdp_version                  2                   noted
ddp_find_unused_parameters    true                honoured
context_parallel_size         2                     refused
sequence_parallel_degree      2                     refused
tensor_parallel_size          2                     refused
use_ray                       true                  refused
use_wandb                     true                  honoured
use_mlflow                    true                  honoured
mlflow_run_name               n                     honoured
hf_mlflow_log_artifacts       true                  honoured
use_trackio                   true                  honoured
trackio_project_name          p                     honoured
trackio_run_name              n                     honoured
trackio_space_id              me/space              honoured
use_comet                     true                  refused
comet_project_name            p                     refused
use_tensorboard               true                  honoured
model_config                  {a: 1}                translated overrides_of_model_config
"""


OF_DATASETS = """
path                          a.jsonl               honoured
type                          chat_template         honoured
name                          main                  honoured
split                         test                  honoured
train_on_split                test                  translated split
revision                      main                  honoured
data_files                    [a.jsonl]             honoured
ds_type                       json                  honoured
field                         body                  honoured
shards                        4                     honoured
shards_idx                    1                     honoured
preprocess_shards             4                     noted
trust_remote_code             true                  refused
conversation                  chatml                refused
field_human                   q                     refused
field_model                   a                     refused
chat_template                 chatml                honoured
chat_template_jinja           "{{ messages }}"      honoured
field_messages                talk                  honoured
message_property_mappings     {role: from}          honoured
message_field_role            from                  refused
message_field_content         value                 refused
message_field_training        train                 honoured
message_field_training_detail detail                refused
roles                         {user: [human]}       honoured
roles_to_train                [assistant]           honoured
train_on_eos                  last                  honoured
train_on_eot                  last                  translated train_on_eos
drop_system_message           true                  refused
field_tools                   tools                 honoured
field_thinking                reasoning             refused
template_thinking_key         reasoning             refused
split_thinking                true                  refused
logprobs_field                p                     refused
temperature                   0.7                   refused
input_format                  x                     refused
input_transform               x                     refused
"""


def table(text: str = OLD + TODAY) -> list[tuple[str, str, str, str]]:
    """(key, value as YAML, fate, of a translation the key that takes its place)."""
    rows = []
    for line in text.strip().splitlines():
        if not line.strip():
            continue
        key, rest = line.split(maxsplit=1)
        written, fate, to = rest.rstrip().rpartition(" ")[0].rstrip(), rest.split()[-1], ""
        if fate not in ("honoured", "noted", "refused"):
            to = fate
            written, fate = written.rpartition(" ")[0].rstrip(), "translated"
        rows.append((key, written, fate, to))
    return rows
