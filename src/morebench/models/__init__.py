"""From a packed batch to a loss: vision encoder, projector, LLM and their composition."""
