"""Dropout of activations whose mask is recomputed rather than kept; for the other ops here."""
