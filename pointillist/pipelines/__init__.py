"""From a model's name to a ready pipeline, from a request to a file."""
