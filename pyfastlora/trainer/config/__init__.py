"""What `fastlora train` can be asked to do: the keys of the YAML, their types, defaults and meaning.

The names are Axolotl's. A key has one of three fates: it is a field of the schema and honoured; foreign.py
lists it, refused or explained; or it is unknown and refused. Nothing is ignored in silence.

The schema is flat, as the file is; a module here has the keys of one subject, rules.py what holds between
keys. load.py reads files, wording.py has the words of the errors, reference.py prints the page.
"""

from pyfastlora.trainer.config.data import DatasetKeys, SourceKeys, TemplateKeys
from pyfastlora.trainer.config.optimisation import BNB_OPTIMIZERS, TORCHAO_OPTIMIZERS
from pyfastlora.trainer.config.schema import Config

__all__ = [
    "BNB_OPTIMIZERS",
    "TORCHAO_OPTIMIZERS",
    "Config",
    "DatasetKeys",
    "SourceKeys",
    "TemplateKeys",
]
