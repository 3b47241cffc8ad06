"""The HTTP server: `scheduler` runs the model, `api` speaks the OpenAI-compatible interface, `app` is the door.

From the inside out: `prefixes` (caches), `scheduler` (one thread, continuous batching), `answers` (its events as text
and log-probabilities), `calls` (reasoning and tool calls), `fields` (what a request may say), `api`, `app`.
"""
