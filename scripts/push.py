"""Uploads an export to the model hub, with its model card and its parity certificate; --dry-run lists the files.

    python scripts/push.py --repo me/my-model --dry-run             the newest export
    python scripts/push.py --repo me/my-model --folder outputs/export/run-hf --public

The token comes from HF_TOKEN, .env or `hf auth login`, and is never shown. A repository that does not exist is created,
private unless --public.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sft import console


def parser() -> argparse.ArgumentParser:
    flags = console.parser(__doc__, config=False)
    add = flags.add_argument
    add("--repo", metavar="NAME/MODEL", required=True, help="the repository on the hub")
    add("--folder", metavar="DIR", type=Path, help="an export (default: the newest in outputs/export)")
    add("--public", action="store_true", help="make the repository public (default: private)")
    add("--dry-run", action="store_true", help="list the files, upload nothing")
    return flags


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Lists the files, and sends them unless this is a dry run."""
    from rich.filesize import decimal

    from sft.config.load import display_path
    from sft.ship.push import newest_export, push

    root = console.project_root()
    folder = args.folder or newest_export(root)
    report = push(folder, args.repo, root, private=not args.public, dry_run=args.dry_run)
    sizes = [(name, decimal(size)) for name, size in [*report.files.items(), ("all", sum(report.files.values()))]]
    done = "would be sent" if args.dry_run else "sent"
    visibility = "private" if report.private else "public"
    console.table(f"{display_path(folder, root)} {done} to {args.repo} ({visibility})", ["file", "size"], sizes)
    unsent = f"nothing was uploaded; to upload it: make push REPO={args.repo}, without DRY=1 (or without --dry-run)"
    console.say(f"uploaded to {report.address}" if report.address else unsent)
    return asdict(report)


if __name__ == "__main__":
    console.run(parser(), main)
