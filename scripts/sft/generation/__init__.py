"""Answers from a model: one engine for eval, infer, compare and evaluation while training.

`engine` generates in batches, `streaming` piece by piece for a chat, `stopping` knows where an answer ends, `serving`
opens a run's model, `evaluation` scores it on rows, `chat_session` is the chat without its terminal.
"""
