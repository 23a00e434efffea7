"""The engine: one thread that serves requests with one model.

engine.py          Engine: submit, cancel, close
loop.py            the thread that decides and runs passes
execution.py       how a pass moves on in time, real or virtual; which suspended passes may be merged into it
clock.py           real time, or the virtual time of a step model
requests.py        a request inside the engine; the client's Stream of tokens, and the request's times
sampling.py        logits to tokens
block_manager.py   which KV blocks belong to which sequence
replay.py          a request trace, sent to an engine
recorder.py        what a replay records of passes
"""
