"""A server in a thread of the test's process; importing this needs the extra `serve`, and the clients."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

import httpx
import llguidance
import openai
import uvicorn

import qwen3np
from qwen3np.serve import fields
from qwen3np.serve.app import application
from qwen3np.serve.scheduler import Busy, Scheduler
from qwen3np.serve.service import Service

__all__ = ["Busy", "client", "fields", "http", "httpx", "llguidance", "openai", "serve"]

http = httpx.Client(timeout=60)


def client(address, key="none"):
    """Return the official client of a server."""
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, http_client=httpx.Client(timeout=60))


@contextmanager
def serve(model=None, waiting=64, memory=10**9, timeout=60.0, **options):
    """Yield the address of a server in a thread of this process, and its service."""
    model = qwen3np.load() if model is None else model
    scheduler = Scheduler(model, waiting=waiting, memory=memory)
    service = Service(model, "tiny", scheduler, timeout)
    config = uvicorn.Config(application(service, **options), port=0, log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join()
