"""The server: OpenAI's API over one engine, with urgencies, limits, and an answer for everybody when it ends.

app.py          the routes: `make_app(engine, settings)`; settings.py: server.yaml
protocol.py     what a client may ask, field by field; body.py reads it; errors.py: refusals in OpenAI's format
service.py      one engine behind the routes: prompts, limits, requests under way, shutdown
admission.py    who may queue; urgency.py: the class of a request
streaming.py    tokens from the engine's thread to asyncio
monitor.py      what the engine does now, for metrics.py (Prometheus), and page.py with static/ (the page at `/`)
spans.py        OpenTelemetry
answers/        text completions, chat completions
batches/        OpenAI's batches, kept in a file
process/        the process: a model, a socket, signals
"""
