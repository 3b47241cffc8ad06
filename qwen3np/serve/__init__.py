"""The HTTP server, which speaks the OpenAI-compatible interface.

From the inside out: `prefixes` (caches), `scheduler` (one thread, continuous batching), `answers` (its events as text
and log-probabilities), `calls` (reasoning and tool calls), `fields` (what a request may say), `service` (requests as
jobs, answers as replies), `completions` and `chats` (the two kinds of answers), `app` (the door).
"""
