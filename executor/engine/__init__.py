"""The engine: one thread that serves requests with one model.

engine.py          Engine: is made, called, closed
frontend.py        what clients ask of it, checked: submit, generate, chat, reprioritize
loop.py            the thread that decides and runs passes
execution.py       how a pass moves on in time (clock.py: real or virtual); which passes may be merged into it
requests.py        a request, and what its client is told; stream.py: what the client holds
text.py            from text to tokens and back
block_manager.py   which KV blocks belong to which sequence
replay.py          a request trace, sent to an engine; recorder.py: what it records of passes
"""
