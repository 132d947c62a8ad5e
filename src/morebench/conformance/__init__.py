"""Do an LLM, a vision encoder and a resolution fit together? Behind `python -m morebench.check`."""
