"""The one exception a user may cause. Everything else that is raised is a defect of ours."""


class UpfitError(ValueError):
    """Bad input, told in one line: what is wrong, what was got, what is allowed, what to do next.

    The command line prints the message and exits with 1; a traceback appears only with `--debug`.
    """
