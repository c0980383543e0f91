"""The one exception that means: the input was wrong, and this sentence says where."""


class FairlineError(ValueError):
    """Bad input, described in one sentence that names what was wrong and where.

    The command line prints the sentence and exits with code 2.
    """
