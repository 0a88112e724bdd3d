"""The packages that the commands in scripts/ share. docs/ARCHITECTURE.md says what each owns and may import."""
