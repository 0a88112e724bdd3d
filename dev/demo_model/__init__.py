"""The demo model and the shipped samples: how both are made, from generated text and a seed."""
