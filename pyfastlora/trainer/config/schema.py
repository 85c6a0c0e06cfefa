"""All keys together: one flat schema, as the file is flat."""

from __future__ import annotations

from pyfastlora.trainer.config.adapter import AdapterKeys
from pyfastlora.trainer.config.data import DataKeys, DatasetKeys
from pyfastlora.trainer.config.engine import EngineKeys
from pyfastlora.trainer.config.loggers import LoggerKeys
from pyfastlora.trainer.config.model import ModelKeys
from pyfastlora.trainer.config.optimisation import OptimisationKeys
from pyfastlora.trainer.config.run import RunKeys
from pyfastlora.trainer.config.schedule import ScheduleKeys


class Config(
    LoggerKeys, RunKeys, EngineKeys, ScheduleKeys, OptimisationKeys, DataKeys, AdapterKeys, ModelKeys
):  # pydantic lists the last one first
    """A whole configuration file."""

    @property
    def bits(self) -> int | None:
        """In how many bits the base is held; None: in floats."""
        return 4 if self.adapter == "qlora" else 8 if self.load_in_8bit else None

    @property
    def sampling(self) -> str:
        """The order of an epoch's samples, by transformers' name."""
        ordered = "random" if self.shuffle_merged_datasets else "sequential"
        return self.train_sampling_strategy or ("group_by_length" if self.group_by_length else ordered)

    def with_template(self, entry: DatasetKeys) -> DatasetKeys:
        """The entry of a dataset with the chat template that holds for it."""
        if entry.chat_template is not None:
            return entry
        keys = ("chat_template", "chat_template_jinja")
        return entry.model_copy(update={key: getattr(self, key) for key in keys})
