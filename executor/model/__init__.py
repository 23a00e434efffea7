"""One model: everything between the engine and the forward pass of transformers.

loading.py         load a model with the hooks, or refuse it: checks.py says why
info.py            what a model is made of, and how much of it fits its device
runner.py          starts passes over one model and one KV cache
passes.py          one pass in a greenlet: advance, suspend, close; split.py: its steps
packed_batch.py    the packed rows of one pass; attention_plan.py: their attention, in which groups
hooks.py           registration with transformers
attention.py       the attention hook; attention_cpu.py: its prefills in float32 on CPUs
experts.py         the experts hook; expert_queues.py: what waits at each expert
kv_cache.py        paged KV, moved to host memory and back
"""
