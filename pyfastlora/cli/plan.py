"""`fastlora plan`."""

from __future__ import annotations

import re

import click

from pyfastlora.cli._flags import as_overrides, keyed, takes_config
from pyfastlora.cli._user_errors import mistakes_reported

DOES_NOT_FIT = 4


class Memory(click.ParamType):
    """ "24GiB", "80GB", "512MiB", or a number of GiB."""

    name = "memory"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"([\d.]+)\s*([MGT]i?B?)?", str(value), re.IGNORECASE)
        if not found or found[1].count(".") > 1 or found[1] == ".":
            self.fail(f"{value!r} is no amount of memory; write 24GiB, 80GB or 512MiB", param, ctx)
        unit = (found[2] or "GiB").upper()
        base = 1024 if "I" in unit else 1000
        return int(float(found[1]) * base ** {"M": 2, "G": 3, "T": 4}[unit[0]])


@keyed()
@takes_config
@click.option("--nproc", default=1, type=click.IntRange(1), help="Processes that train together.")
@click.option("--memory", type=Memory(), help="Of the device, such as 24GiB, instead of what is here.")
@click.option("--benchmark", metavar="FILE", help="An adapter_tax.json, to guess tokens per second from.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(
    ctx: click.Context,
    config: str,
    overrides: tuple[str, ...],
    nproc: int,
    memory: int | None,
    benchmark: str | None,
    as_json: bool,
) -> None:
    """Say how much memory a job needs, and whether it fits.

    \b
    fastlora plan cfg.yaml
    fastlora plan cfg.yaml --memory 24GiB --micro-batch-size 8
    fastlora plan cfg.yaml --nproc 8 --strategy zero3 --json

    No weights are read: a step runs without values, and what it would keep alive is counted. Where that
    does not fit, the cheapest change of the file that makes it fit is looked for.

    \b
    Exit codes: 0 it fits; 4 it does not; 2 a mistake in the command line or the file; 1 anything else, such
    as a model without config.json.
    """
    overrides = (*overrides, *as_overrides(ctx.args))
    with mistakes_reported():
        from pyfastlora.trainer.config.load import load_config
        from pyfastlora.trainer.console import Console

        loaded = load_config(config, overrides)
        from pyfastlora.trainer.planning import plan_job

        fits = plan_job(
            loaded,
            Console(),
            processes=nproc,
            memory=memory,
            benchmark=benchmark,
            as_json=as_json,
        )
    ctx.exit(0 if fits else DOES_NOT_FIT)
