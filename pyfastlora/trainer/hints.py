"""Errors of the libraries below that people meet again and again, and what to do about each."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Hint:
    """`pattern` is looked for in "TypeError: its message"; the sentence says what to do."""

    pattern: str
    sentence: str


HINTS = (
    Hint(
        r"exit ?code\s*:?\s*-9|SIGKILL|Signal 9",
        "the system killed a process, mostly for want of RAM: every process loads the model; use fewer "
        "(--nproc), adapter: qlora, or dataloader_num_workers: 0; `fastlora plan` says what is needed",
    ),
    Hint(
        r"expected scalar type \w+ but found \w+|must have the same dtype|have the same dtype, but got",
        "two number formats meet without autocast: set bf16: true, or fp16: true on a GPU without bfloat16",
    ),
    Hint(
        r"memory_efficient_attention_forward|xformers",
        "xformers has no kernel for this: remove xformers_attention and say attn_implementation: sdpa",
    ),
    Hint(
        r"accelerate config|default_config\.yaml",
        "there is nothing to do: fastlora needs no configuration of accelerate",
    ),
    Hint(
        r"(?s)NCCL.*tim(ed|e) ?out|collective operation timeout|Watchdog caught",
        "a process waited for another in vain: raise ddp_timeout where one has more to do; try "
        "NCCL_P2P_LEVEL=NVL or NCCL_P2P_DISABLE=1 where GPUs cannot reach each other; NCCL_DEBUG=INFO "
        "says more",
    ),
    Hint(
        r"stack expects each tensor to be equal size",
        "samples of different lengths were put together as they are: say sample_packing: false for inference",
    ),
    Hint(
        r"device-side assert|index out of range in self",
        "most often a token id beyond the embeddings: the tokenizer has more tokens than base_model; "
        "`fastlora doctor` checks that, CUDA_LAUNCH_BLOCKING=1 shows where it is",
    ),
    Hint(
        r"CUDA driver version is insufficient|NVIDIA driver on your system is too old",
        "this torch was built for a newer CUDA than the driver has: update the driver, or install a torch "
        "for its CUDA (`nvidia-smi` shows which)",
    ),
    Hint(
        r"no kernel image is available|invalid device function",
        "torch or an extension was not built for this GPU: install a torch that supports it, and run "
        "`fastlora build` for our kernels",
    ),
    Hint(
        r"CUBLAS_STATUS_(NOT_INITIALIZED|ALLOC_FAILED)|CUDNN_STATUS_NOT_INITIALIZED",
        "the GPU had no memory left for a library's workspace: `fastlora plan` says what would fit",
    ),
    Hint(
        r"\[Errno 28\]|No space left on device",
        "the disk is full: free some, or set output_dir, dataset_prepared_path or HF_HOME to another; "
        "save_total_limit: 1 keeps one checkpoint",
    ),
    Hint(
        r"\[Errno 24\]|Too many open files",
        "raise the limit of open files (`ulimit -n 65536`), or set dataloader_num_workers: 0",
    ),
    Hint(
        r"current process just got forked.*parallelism|TOKENIZERS_PARALLELISM",
        "a warning, no error: TOKENIZERS_PARALLELISM=false keeps it away",
    ),
    Hint(
        r"DataLoader worker.*(Bus error|killed by signal)",
        "a worker ran out of shared memory: set dataloader_num_workers: 0, or give /dev/shm more room",
    ),
    Hint(
        r"does not require grad and does not have a grad_fn",
        "no gradient reaches the adapter: say gradient_checkpointing_kwargs: {use_reentrant: false}",
    ),
    Hint(
        r"(?i)gated repo|401 Client Error",
        "the hub asks who you are: accept the model's terms on its page, then `hf auth login`",
    ),
    Hint(
        r"(?i)address already in use",
        "the port is taken, by a run that goes on or did not end well: end it, or name another port",
    ),
)


def add_hint(error: BaseException) -> None:
    """Puts a line behind the traceback that the error will be printed with, where something is known."""
    if known := hint(error):
        error.add_note(f"hint: {known}")


def hint(error: BaseException) -> str | None:
    """What to do about an error, or about one that it was raised from; None where nothing is known."""
    seen: BaseException | None = error
    while seen is not None:
        text = f"{type(seen).__name__}: {seen}"
        for known in HINTS:
            if re.search(known.pattern, text):
                return known.sentence
        seen = seen.__cause__ or seen.__context__
    return None
