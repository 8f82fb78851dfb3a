"""The command line: parse, call one function, print. Everything heavy is imported inside the commands.

The order of the imports is that of the verbs in `upfit --help`.
"""

import os
import sys

from upfit.cli.base import app
from upfit.errors import UpfitError

# isort: off
from upfit.cli import looking as looking
from upfit.cli import conversions as conversions
from upfit.cli import training as training
from upfit.cli import measuring as measuring
# isort: on


def main() -> None:
    """Entry point: errors a user can cause are one line and exit 1; a traceback only with `--debug`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except UpfitError as error:
        if "--debug" in sys.argv:
            raise
        if os.environ.get("RANK", "0") == "0":  # under torchrun all processes fail alike, one tells
            print(f"upfit: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("upfit: stopped; nothing unfinished stands at the output", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
