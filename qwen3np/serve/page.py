"""The page at /: a chat in the browser, in one file that loads nothing else and is the same for everybody."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from qwen3np.serve.fields import SETTINGS
from qwen3np.serve.service import Service


def describe(service: Service) -> dict[str, Any]:
    """Return what the page reads in /v1/models: default settings, and whether the template can switch reasoning."""
    defaults: dict[str, Any] = dict(service.model.generation_defaults())
    names = {"max_tokens": "max_new_tokens", **SETTINGS}
    numbers = {theirs: defaults[ours] for theirs, ours in names.items() if isinstance(defaults.get(ours), (int, float))}
    return {"defaults": numbers, "thinking": "enable_thinking" in (service.tokenizer.chat_template or "")}


async def page(service: Service, request: Request) -> Response:
    """Return the page. It holds nothing of the model, so it needs no key; its script asks for what it shows."""
    html, policy = _composed()
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    return HTMLResponse(html, headers={**headers, "Cache-Control": "no-cache"})


@cache
def _composed() -> tuple[str, str]:
    """The page with its style and script, and the policy that allows these two by their hashes, and nothing else.

    Trusted Types make every attempt to turn a string into HTML an error.
    """
    html, style, script = (
        (Path(__file__).parent / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    html = html.replace("<style></style>", f"<style>{style}</style>")
    html = html.replace("<script></script>", f"<script>{script}</script>")
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    )
    return html, policy


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
