"""Base models: loading them safely, and making them out of GGUF files."""
