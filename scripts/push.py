"""Sends an export to the model hub, with its model card and its parity certificate; --dry-run shows what would go.

    python scripts/push.py --repo me/my-model --dry-run             # the newest export
    python scripts/push.py --repo me/my-model --folder outputs/export/run-hf --public

The token is taken from HF_TOKEN, .env or `hf auth login`, and never shown. A repository that is not there is made,
private unless --public.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sft import console


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    made = console.parser(
        "Send an export to the model hub with its model card.",
        """python scripts/push.py --repo me/my-model --dry-run
python scripts/push.py --repo me/my-model --folder outputs/export/run-gguf --public""",
        config=False,
    )
    made.add_argument("--repo", metavar="NAME/MODEL", required=True, help="the repository on the hub")
    made.add_argument("--folder", metavar="DIR", type=Path, help="an export (default: the newest in outputs/export)")
    made.add_argument("--public", action="store_true", help="everybody may see it (default: private)")
    made.add_argument("--dry-run", action="store_true", help="send nothing, show what would go")
    return made


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Lists what goes, and sends it unless this is a dry run."""
    from rich.filesize import decimal

    from sft.ship.push import newest, push

    root = console.project_root()
    folder = args.folder or newest(root)
    report = push(folder, args.repo, root, private=not args.public, dry_run=args.dry_run)
    sizes = [(name, decimal(size)) for name, size in [*report.files.items(), ("all", sum(report.files.values()))]]
    verb = "would go" if args.dry_run else "gone"
    seen = "private" if report.private else "public"
    console.table(f"{folder} {verb} to {args.repo} ({seen})", ["file", "size"], sizes)
    unsent = f"nothing was sent; to send it: make push REPO={args.repo}, without DRY=1 (or leave out --dry-run)"
    console.say(f"it is at {report.address}" if report.address else unsent)
    return asdict(report)


if __name__ == "__main__":
    console.run(parser(), main)
