"""One video on several GPUs: what the processes of a job split, exchange and agree on.

Diffusers' context parallelism is the engine: its `ContextParallelConfig`, its meshes, its exchanges of heads (Ulysses)
and of keys (ring). Added here is what a plan needs: which heads are whose, where the tokens of an exchanged sequence
belong, the rows and columns of a layout that a rank of a ring sees, and that all processes decide alike.
"""
