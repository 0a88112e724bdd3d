"""Every write that must not be lost goes through here: atomic files and folders, hashes, locks.

A file is written beside its target, fsynced, renamed over it, and its folder fsynced: a reader, a crash or a full disk
sees the old file or the new one, never half of one. A disk that refuses is an EnvironmentProblem with what is free.
"""

from sft.files.atomic import atomic_file, atomic_folder, point, read_json, sweep, write_json, write_text
from sft.files.door import append, make_folder, put, remove, rename, size, sync, writing
from sft.files.locks import lock, locked
from sft.files.manifest import MANIFEST, manifest_problem, sha256, write_manifest

__all__ = [
    "MANIFEST", "append", "atomic_file", "atomic_folder", "lock", "locked", "make_folder", "manifest_problem", "point",
    "put", "read_json", "remove", "rename", "sha256", "size", "sweep", "sync", "write_json", "write_manifest",
    "write_text", "writing",
]  # fmt: skip
