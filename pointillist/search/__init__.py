"""From a ready pipeline and prompts to a plan; never loads a pipeline itself."""
