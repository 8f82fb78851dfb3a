"""What every stage of a run shares."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upfit.checkpoint.source import Source
from upfit.options import as_flags, as_keys
from upfit.uptrain.config import Config

CONFIG_FILE = "uptrain.toml"


@dataclass(frozen=True)
class Job:
    """What the user asked for: `source` is the model that the first stage starts from, `data` what it reads."""

    source: Source
    data: str
    out: Path
    config: Config
    tables: dict[str, dict[str, Any]]
    resume: bool
    overwrite: bool

    @property
    def command(self) -> str:
        """What gives the same again; what is no flag, and what stages have of their own, is in the config beside the result."""
        words = ["upfit", "uptrain", self.source.name, self.data, str(self.out), *as_flags(self.config)]
        if self.beside_flags:
            words += ["--config", str(self.out / CONFIG_FILE)]
        return shlex.join(words)

    @property
    def beside_flags(self) -> dict[str, Any]:
        """What of the config beside the result no flag says: keys that are not at their defaults, and tables of stages."""
        return as_keys(self.config) | self.tables
