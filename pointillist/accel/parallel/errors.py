"""What ends a job of several processes."""


class ParallelError(RuntimeError):
    """The processes of a job cannot go on together: which, and why."""
