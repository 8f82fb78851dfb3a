"""What every stage of a run shares."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upfit.checkpoint.source import Source
from upfit.options import as_flags
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
        """What gives the same again; what the stages have of their own is in the config that lies beside the result."""
        words = ["upfit", "uptrain", self.source.name, self.data, str(self.out)]
        return shlex.join([*words, *as_flags(self.config), *(["--config", str(self.out / CONFIG_FILE)] if self.tables else [])])
