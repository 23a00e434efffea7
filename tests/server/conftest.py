"""These tests need PyTorch, transformers and the server's packages; without them they are not collected."""

from importlib.util import find_spec

import pytest

if any(find_spec(name) is None for name in ("torch", "transformers", "fastapi", "uvicorn", "httpx", "openai")):
    collect_ignore_glob = ["test_*.py"]
else:
    from qllm.executor import Engine
    from qllm.executor.testing import tiny_model
    from qllm.scheduler import Limits
    from qllm.server.process.demo import demo_tokenizer

    @pytest.fixture(scope="module")
    def engine(one_thread):
        """One engine a module: a tiny Qwen3-MoE that reads and writes any text."""
        tokenizer = demo_tokenizer()
        model = tiny_model("qwen3_moe", vocab_size=len(tokenizer), max_position_embeddings=4096)
        limits = Limits(max_seqs=8, max_batched_tokens=256, kv_blocks=2048)
        with Engine(model, tokenizer, policy="slack", limits=limits, seed=1) as one:
            yield one
