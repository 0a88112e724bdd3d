"""Rows: read from any file, checked one by one, split, styled, and read again for training."""
