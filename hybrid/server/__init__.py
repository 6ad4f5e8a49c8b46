"""The HTTP server: the OpenAI and Anthropic APIs over an `AsyncEngine`."""
