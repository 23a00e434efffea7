"""The engine: one thread that serves requests with one model.

engine.py          Engine: submit, cancel, close
loop.py            the thread that decides and runs passes
execution.py       how a pass moves on in time (clock.py: real or virtual); which passes may be merged into it
requests.py        a request; stream.py: the client's tokens and times; checks.py: what a client may ask
block_manager.py   which KV blocks belong to which sequence
replay.py          a request trace, sent to an engine; recorder.py: what it records of passes
"""
