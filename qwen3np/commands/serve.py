"""`qwen3np serve`: the HTTP interface of OpenAI's clients."""

from __future__ import annotations

import argparse
import os
import socket
import sys

from qwen3np.commands import add_computation, add_guesses, add_model, guessing, load_model
from qwen3np.memory import available_memory
from qwen3np.settings import checked, require_ids

EXAMPLE = "qwen3np serve --model Qwen/Qwen3-0.6B --port 8000"
HELP = "serve the model over HTTP, for clients of the OpenAI interface"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--host", default="127.0.0.1", metavar="H", help="the address to listen on (default: loopback)")
    parser.add_argument("--port", type=int, default=8000, metavar="P", help="the port (default: 8000; 0: any free one)")
    key = "requests must bear this key (default: QWEN3NP_API_KEY, else none is needed)"
    parser.add_argument("--api-key", metavar="KEY", default=os.environ.get("QWEN3NP_API_KEY"), help=key)
    allow = "a name that the Host header may have, besides localhost and addresses (repeatable)"
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help=allow)
    parser.add_argument("--name", metavar="NAME", help="the name of the model for clients (default: --model)")
    waiting = "requests that may wait; further ones get status 429 (default: 64)"
    parser.add_argument("--max-waiting", type=int, default=64, metavar="N", help=waiting)
    memory = "memory for caches, of running requests and kept prefixes (default: half of what is free)"
    parser.add_argument("--cache-memory", type=float, metavar="GB", help=memory)
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="end a request after S s (default: 600)"
    )
    add_guesses(parser)
    add_model(parser)
    add_computation(parser)


def run(arguments: argparse.Namespace) -> None:
    """Serve until Ctrl-C or SIGTERM, which let running requests finish; a second one stops at once."""
    try:
        import uvicorn

        from qwen3np.serve.app import application
        from qwen3np.serve.scheduler import Scheduler
        from qwen3np.serve.service import Service
    except ImportError as error:
        raise ValueError(f"serve needs {error.name}: pip install qwen3np[serve]") from None
    if not 0 <= arguments.port < 1 << 16:
        raise ValueError(f"--port {arguments.port}: ports are 0 to 65535")
    sizes = (arguments.max_waiting, arguments.timeout, arguments.cache_memory)
    if not all(x is None or x > 0 for x in sizes):
        raise ValueError("--max-waiting, --timeout and --cache-memory must be positive")
    family = socket.AF_INET6 if ":" in arguments.host else socket.AF_INET
    listener = socket.create_server((arguments.host, arguments.port), family=family, backlog=512)
    # else the body of a reply waits 40 ms for the client's delayed acknowledgment of its headers
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    model, _ = load_model(arguments)
    guesses = guessing(arguments)
    memory = int((arguments.cache_memory or 0) * 1e9) or (available_memory() or 2 * 10**9) // 2
    require_ids(checked({**guesses, "max_new_tokens": 1}), model.config)
    computed = {"numerics": arguments.numerics, "engine": arguments.engine}
    scheduler = Scheduler(model, waiting=arguments.max_waiting, memory=memory, guesses=guesses, **computed)
    service = Service(model, arguments.name or arguments.model or "qwen3np-builtin", scheduler, arguments.timeout)
    app = application(service, key=arguments.api_key, hosts=[*arguments.allow_host, arguments.host])
    if arguments.host not in ("127.0.0.1", "localhost", "::1") and arguments.api_key is None:
        print("[anyone who reaches this address may use the model: --api-key restricts that]", file=sys.stderr)
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    address = f"http://{host}:{listener.getsockname()[1]}"
    print(f"serving {service.name}: a chat at {address}/, the API at {address}/v1", file=sys.stderr, flush=True)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=30,
        limit_concurrency=1024,
    )
    uvicorn.Server(config).run([listener])
