"""Answers from a model, the same in evaluation, chat, batches and training: `engine` generates them, `decode` is the
loop behind it, `stop` ends them; `load` opens a run's model, `evaluate` scores it on rows, `chat` and `batch_io` are
the two ways to talk with it."""
