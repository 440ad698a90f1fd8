"""The front end for HTTP: OpenAI's API on a ``Runtime``."""
