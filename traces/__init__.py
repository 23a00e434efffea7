"""Request traces and timing traces: readers, writers, generators, and the data files that ship."""

if __name__ != "qllm.traces":
    raise ImportError("this package is called qllm.traces: from qllm.traces import ...")
