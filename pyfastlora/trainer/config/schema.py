"""All keys together: one flat schema, as the file is flat."""

from __future__ import annotations

from pyfastlora.trainer.config.adapter import AdapterKeys
from pyfastlora.trainer.config.data import DataKeys
from pyfastlora.trainer.config.model import ModelKeys
from pyfastlora.trainer.config.optimisation import OptimisationKeys
from pyfastlora.trainer.config.run import RunKeys


class Config(
    RunKeys, OptimisationKeys, DataKeys, AdapterKeys, ModelKeys
):  # pydantic lists the last one first
    """A whole configuration file."""

    @property
    def quantised(self) -> bool:
        """Whether the base is held in 4 bits."""
        return self.adapter == "qlora"
