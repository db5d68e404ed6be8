"""The agent that chooses a hint per session (Re2LLM, arXiv 2403.16427, section 3.3)."""
