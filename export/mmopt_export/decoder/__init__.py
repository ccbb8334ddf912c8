"""Causal decoders: one graph for prefill and decode, traced from the Hugging Face model."""
