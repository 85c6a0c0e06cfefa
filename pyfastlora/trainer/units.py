"""Bytes and seconds in words."""

from __future__ import annotations

from datetime import timedelta

GiB = 2**30


def in_words(count: float) -> str:
    """ "1.23 GiB", "45.6 MiB"."""
    return f"{count / GiB:.2f} GiB" if count >= GiB else f"{count / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """ "1:02:03", "2 days, 0:00:05"."""
    return str(timedelta(seconds=round(seconds)))
