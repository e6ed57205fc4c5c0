"""OPEA-style components: the fine-tuning service and the library it runs."""

__version__ = "0.1.0"
