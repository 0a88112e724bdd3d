"""Builds the demo model and the shipped samples from generated text and a seed."""
