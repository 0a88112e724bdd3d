"""The configuration: typed keys, layered YAML files, and the written rules behind every `auto`.

`load.load` reads a run's file, `auto.resolve` settles what is left to the machine, `paths.resolve` finds files.
Nothing here imports torch or transformers.
"""
