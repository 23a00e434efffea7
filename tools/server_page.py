"""The picture of the server's page in the documents: docs/img/server_page.png.

python tools/server_page.py [FILE]

It serves the demo's model here, sends it long prompts as BE and short ones as LS for a while, and has Chromium draw the
page meanwhile. Numbers in the picture are those of the machine that drew it.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import uvicorn

from qllm.executor import Engine
from qllm.scheduler import Limits
from qllm.server.app import make_app
from qllm.server.process.demo import demo_model, demo_tokenizer
from qllm.server.settings import ServerSettings

FILE = Path(__file__).parents[1] / "docs" / "img" / "server_page.png"
WARM_S, PAGE_S = 25.0, 3.0  #: seconds of load before the page is opened, and of the page before it is drawn
LOAD = (("default", 60, 12, 1.2), ("flex", 3000, 8, 0.4))  #: tier, tokens of the prompt, new ones, requests per second


def load(url: str, tier: str, prompt: int, new: int, rate: float, stop: threading.Event) -> None:
    """Requests at random moments until `stop`."""
    rng = random.Random(tier)

    def ask() -> None:
        ids = [rng.randrange(10, 900) for _ in range(rng.randrange(prompt // 2, prompt))]
        body = {"prompt": ids, "max_tokens": new, "service_tier": tier, "ignore_eos": True}
        httpx.post(f"{url}/v1/completions", json=body, timeout=120).raise_for_status()

    while not stop.wait(rng.expovariate(rate)):
        threading.Thread(target=ask, daemon=True).start()


def draw(url: str, file: Path) -> None:
    """Have Chromium draw the page."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or "chromium"
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "page.png"
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={folder}/profile", "--window-size=1100,1010", f"--screenshot={shot}"]
        command += [f"--virtual-time-budget={int(1000 * PAGE_S)}", f"{url}/"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        shutil.move(shot, file)


def main(file: Path = FILE) -> None:
    tokenizer = demo_tokenizer()
    limits = Limits(max_seqs=16, max_batched_tokens=4096, kv_blocks=4096)
    with Engine(demo_model(len(tokenizer)), tokenizer, policy="slack", limits=limits, seed=0) as engine:
        app = make_app(engine, ServerSettings(model_name="demo"))
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        stop = threading.Event()
        loads = [threading.Thread(target=load, args=(url, *one, stop)) for one in LOAD]
        for one in loads:
            one.start()
        time.sleep(WARM_S)
        draw(url, file)
        stop.set()
        for one in loads:
            one.join()
        server.should_exit = True
        thread.join()
    print(file)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
