"""The one exception that a user may cause. Any other exception is a defect of ours."""


class UpfitError(ValueError):
    """Bad input, told in one line: what is wrong, what was given, what is allowed, what to do next.

    The command line prints the message and exits with 1; a traceback appears only with `--debug`.
    """
