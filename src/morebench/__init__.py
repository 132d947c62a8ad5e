"""Controlled comparisons of LLaVA-style multimodal LLMs."""
