"""Region-adaptive sampling: in some steps only the tokens that matter are computed (RAS, arXiv 2502.10389).

`policy.py` says how, `choose.py` which tokens, `rows.py` takes them through a transformer.
"""
