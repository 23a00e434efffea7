"""The executor: Hugging Face MoE models in PyTorch, every forward pass suspendable between two experts.

model      load a model with the hooks, or refuse it          passes    one pass in a greenlet: advance, suspend, close
support    what is refused, and why                           cuts      where a pass can stop
hooks      registration with transformers                     batch     packed rows and their attention plan
attention  attention hook                                     kv_cache  paged KV, moved to host memory and back
experts    experts hook                                       sampling  logits to tokens
linear     packed weights on CPUs                             families  the MoE families of transformers, tiny models
runner     starts passes over one model and one KV cache
"""
