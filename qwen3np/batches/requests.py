"""The lines of a batch file as requests, and requests of similar length together, as packets of work."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

from qwen3np.rules import REQUIRED, Rule
from qwen3np.serve.fields import BODY, BadRequest, checked, decoded
from qwen3np.serve.scheduler import ROWS

GENERATING = ("/v1/completions", "/v1/chat/completions")
URLS = (*GENERATING, "/v1/embeddings", "/v1/rerank", "/score", "/trace")
LONGEST = BODY + 4096  # bytes of a line
PACKET = 8192  # tokens: a packet costs a scheduler about a millisecond, and a worker that dies loses one or two
WINDOW, WINDOW_BYTES = 1 << 16, 1 << 26  # lines that are sorted by length together

_LINE = {
    "custom_id": Rule(lambda x: isinstance(x, str) and 0 < len(x) <= 512, "a text of 1 to 512 characters", REQUIRED),
    "method": Rule(lambda x: x == "POST", '"POST"', "POST"),
    "url": Rule(lambda x: x in URLS, f"one of {', '.join(URLS)}", REQUIRED),
    "body": Rule(lambda x: isinstance(x, dict), "an object", REQUIRED),
}

Key: TypeAlias = "str | int"


class Request(NamedTuple):
    """A line. One that is not a request has the error and no url."""

    line: int  # from 1
    key: Key  # the custom_id; the number of the line where there is none, or another line has the same
    url: str
    body: dict[str, Any]
    size: int  # bytes
    error: str = ""

    @property
    def cost(self) -> int:
        """The tokens to compute, estimated without a tokenizer: four bytes each, and those of the answer."""
        most = self.body.get("max_tokens") or self.body.get("max_completion_tokens") or 0
        return self.size // 4 + 1 + (most if type(most) is int and self.url in GENERATING else 0)


def requests_of(lines: Iterable[bytes]) -> Iterator[Request]:
    """Yield the request of each line that is not blank."""
    seen = set[str]()
    for n, line in enumerate(lines, 1):
        if line and not line.isspace():
            yield _request(n, line, seen)


def _request(n: int, line: bytes, seen: set[str]) -> Request:
    key: Key = n
    try:
        if len(line) > LONGEST:
            raise BadRequest(f"the line has more than {LONGEST:,} bytes")
        given = decoded(line)
        found, _ = checked(given, _LINE)
        if found["custom_id"] in seen:
            raise BadRequest("another line before has this custom_id", parameter="custom_id")
        seen.add(key := found["custom_id"])
    except BadRequest as error:
        return Request(n, key, "", {}, len(line), str(error))
    return Request(n, key, found["url"], found["body"], len(line))


def packets(requests: Iterable[Request]) -> Iterator[list[Request]]:
    """Yield all requests in packets of one url and about as many tokens each, the longest of a window first.

    A packet depends only on the requests, so whoever computes it, its answers are the same.
    """
    for window in _windows(requests):
        window.sort(key=lambda request: (request.url, -request.cost, request.line))
        for url, group in groupby(window, lambda request: request.url):
            fewest = 4 * ROWS if url in GENERATING else 1  # answers are decoded ROWS at a time
            packet, tokens = list[Request](), 0
            for request in group:
                if len(packet) >= fewest and tokens + request.cost > PACKET:
                    yield packet
                    packet, tokens = [], 0
                packet.append(request)
                tokens += request.cost
            yield packet


def _windows(requests: Iterable[Request]) -> Iterator[list[Request]]:
    window, size = list[Request](), 0
    for request in requests:
        window.append(request)
        size += request.size
        if len(window) == WINDOW or size > WINDOW_BYTES:
            yield window
            window, size = [], 0
    if window:
        yield window


def left_of(packet: list[Request], done: Collection[Key]) -> list[Request]:
    """Return what is to be computed so that a packet is done.

    Vectors depend, to float32 rounding, on what is computed with them: they are all computed again.
    """
    left = [request for request in packet if request.key not in done]
    return packet if left and packet[0].url == "/v1/embeddings" else left
