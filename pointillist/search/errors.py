"""What a search says when it cannot go on."""


class SearchError(ValueError):
    """A search that cannot go on: what was found, and what to do."""
