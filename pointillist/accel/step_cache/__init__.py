"""Step caching: a step's transformer call is computed, or what earlier ones gave is reused.

A decider says which (one file each), a predictor says what stands in (`predictors.py`), `stack.py` does it.
"""
