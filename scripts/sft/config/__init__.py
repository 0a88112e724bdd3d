"""The configuration: typed keys, layered YAML files, and the written rules behind every `auto`.

`load.load` reads a run's file, `auto.resolve` replaces every `auto`, `load.resolve_path` resolves the paths in it.
Nothing here imports torch or transformers.
"""
