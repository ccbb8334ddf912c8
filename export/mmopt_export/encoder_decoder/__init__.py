"""Encoder-decoder models as two graphs, `encoder` and `decoder`, and what generates with them."""
