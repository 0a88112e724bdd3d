"""TensorBoard in the background, on loopback, on outputs/tb.

python scripts/tb.py start --port 6006     start ours, or say where it runs
python scripts/tb.py stop                  stop ours, and only ours
python scripts/tb.py clean                 remove the event files (asks, or --force)
python scripts/tb.py open                  print the address and the folder
"""

from __future__ import annotations

import argparse
from typing import Any

from sft import console


def parser() -> argparse.ArgumentParser:
    flags = console.parser(__doc__, config=False)
    add = flags.add_argument
    add("action", choices=["start", "stop", "clean", "open"])
    add("--port", type=int, default=6006, help="port on 127.0.0.1 (default 6006)")
    add("--force", action="store_true", help="clean without asking")
    return flags


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Runs one action and prints its result."""
    from sft.report import tensorboard

    logdir = console.project_root() / "outputs" / "tb"
    if args.action == "start":
        ours, new = tensorboard.start(logdir, args.port)
        console.say(f"TensorBoard {'started' if new else 'already runs'}: {ours.address} (make tb-stop stops it)")
        return {"pid": ours.pid, "port": ours.port, "started": new}
    if args.action == "stop":
        stopped = tensorboard.stop(logdir)
        console.say(f"stopped TensorBoard (pid {stopped.pid})" if stopped else "no TensorBoard of sft-play is running")
        return {"stopped": stopped.pid if stopped else None}
    if args.action == "clean":
        return _clean(args.force)
    running = tensorboard.running(logdir)
    address = running.address if running else f"http://{tensorboard.HOST}:{args.port} (not running: make tensorboard)"
    console.say(f"folder:  {logdir}\naddress: {address}\nby hand: tensorboard --logdir {logdir} --port {args.port}")
    return {"logdir": str(logdir), "address": address, "running": running is not None}


def _clean(force: bool) -> dict[str, Any]:
    logdir = console.project_root() / "outputs" / "tb"
    paths = sorted(logdir.rglob("events.out.tfevents.*"))
    question = f"Remove {len(paths)} event files under {logdir}?"
    if paths and not console.confirmed(question, force, "make tb-clean FORCE=1"):
        console.say("nothing was removed")
        return {"removed": 0}
    for path in paths:
        path.unlink()
    console.say(f"removed {len(paths)} event files from {logdir}")
    return {"removed": len(paths)}


if __name__ == "__main__":
    console.run(parser(), main)
