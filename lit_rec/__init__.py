"""lit_rec: LLM-enhanced recommendation on Lightning."""

__version__ = "0.1.0"
