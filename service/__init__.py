"""gRPC microservice for structured vision inference with Qwen3-VL."""

__version__ = "0.1.0"
