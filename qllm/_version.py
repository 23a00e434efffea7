"""The version, as it is installed; a module of its own, since looking it up takes longer than `qllm --help` may."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("qllm-moe")
except PackageNotFoundError:  # run from a folder that was never installed
    __version__ = "unknown"
