"""The command line: parse, call one function, print. Everything heavy is imported inside the commands.

The order of the imports is that of the verbs in `upfit --help`.
"""

import io
import os
import sys
from contextlib import suppress

from upfit.cli.base import app, carry_errors
from upfit.cli.boundary import end, terminable, unpacked

# isort: off
from upfit.cli import looking as looking
from upfit.cli import conversions as conversions
from upfit.cli import training as training
from upfit.cli import measuring as measuring
# isort: on

carry_errors(app)


def main() -> None:
    """Entry point: errors a user can cause are one line and exit 1; a traceback only with `--debug`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # of a stream that somebody else has set up
                stream.reconfigure(errors="backslashreplace")  # names need not be text; JSON reads such a backslash back
    with terminable():
        try:
            app()
        except SystemExit:
            raise
        except BaseException as error:  # a panic of a library in Rust is no Exception
            code = end(unpacked(error), sys.argv[1:])
    sys.exit(code)
