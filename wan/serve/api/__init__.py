"""The HTTP API that clients of OpenAI's videos speak."""
