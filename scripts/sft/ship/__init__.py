"""Merging, exporting and publishing a tuned model. The files that record what was checked: their names."""

MERGE_REPORT = "merge.json"
EXPORT_REPORT = "export.json"
PARITY = "parity.json"
