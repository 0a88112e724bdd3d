"""Metrics of text: pure functions over predictions, references and sources; no model, no torch, no network."""
