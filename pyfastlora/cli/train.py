"""`fastlora train`."""

from __future__ import annotations

import click

from pyfastlora.cli._flags import as_overrides, keyed
from pyfastlora.cli._threads import give_way
from pyfastlora.cli._user_errors import mistakes_reported


@keyed()
@click.argument("config", type=click.Path(dir_okay=False))
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key of the file; repeatable."
)
@click.option(
    "--resume",
    metavar="auto|PATH|never",
    help="Go on from the newest checkpoint in output_dir, where there is one, or from the one at PATH.",
)
@click.option("--nproc", type=click.IntRange(1), help="Processes of this machine (its GPUs, or one).")
@click.option("--nnodes", type=click.IntRange(1), default=1, help="Machines; the same command runs on each.")
@click.option("--node-rank", type=click.IntRange(0), default=0, help="Which of them this is, from 0.")
@click.option("--rdzv-endpoint", metavar="HOST:PORT", help="Where machines meet: the first one's address.")
@click.option("--max-restarts", type=click.IntRange(0), default=0, help="Starts again after a failure.")
@click.option("--resume-anyway", is_flag=True, help="Also if data, configuration or versions have changed.")
@click.option("--dry-run", is_flag=True, help="One step on the fullest batch; nothing is left of it.")
@click.pass_context
def train(
    ctx: click.Context,
    config: str,
    overrides: tuple[str, ...],
    resume: str | None,
    resume_anyway: bool,
    nproc: int | None,
    nnodes: int,
    node_rank: int,
    rdzv_endpoint: str | None,
    max_restarts: int,
    dry_run: bool,
) -> None:
    """Train an adapter as a YAML file describes it.

    \b
    fastlora train examples/lora.yaml
    fastlora train cfg.yaml --learning-rate 1e-4 --lora_r=32
    fastlora train cfg.yaml --set datasets[0].path=data.jsonl
    fastlora train cfg.yaml --dry-run
    fastlora train cfg.yaml --resume auto
    fastlora train cfg.yaml --nproc 4 --strategy fsdp2
    fastlora train cfg.yaml --nnodes 2 --node-rank 0 --rdzv-endpoint node0:29500

    Keys have Axolotl's names; docs/config.md lists them. The adapter lands in output_dir in PEFT's
    format, with the resolved configuration, metrics (log.jsonl) and the kernel report beside it. SIGUSR1
    saves a checkpoint; SIGTERM and Ctrl-C save one and stop.

    \b
    Exit codes: 0 trained; 2 a mistake in the command line or the file; 3 a dataset is missing or malformed;
    130 stopped by a signal, with a checkpoint; 1 anything else, such as too little memory.
    """
    overrides = (*overrides, *as_overrides(ctx.args))
    give_way()
    with mistakes_reported():
        from pyfastlora.trainer.config.load import load_config
        from pyfastlora.trainer.console import Console

        loaded = load_config(config, overrides)
        from pyfastlora.trainer.launch import Layout, failures_told, launch, wanted_processes

        count = wanted_processes(loaded.config, nproc, nnodes, max_restarts)
        if count:
            resume = resume or ("auto" if max_restarts else None)
            arguments = ["train", config, *(part for o in overrides for part in ("--set", o))]
            arguments += ["--resume", resume] if resume else []
            arguments += ["--resume-anyway"] if resume_anyway else []
            arguments += ["--dry-run"] if dry_run else []
            launch(arguments, Layout(count, nnodes, node_rank, rdzv_endpoint, max_restarts))
            return
        from pyfastlora.trainer.dry_run import dry_run as rehearse
        from pyfastlora.trainer.job import train as run_job

        with failures_told():
            if dry_run:
                rehearse(loaded, Console())
            else:
                run_job(loaded, Console(), resume, resume_anyway)
