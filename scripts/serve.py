"""Serves the kit on this machine: a page to work in, jobs over REST, and an endpoint for programs that chat.

    python scripts/serve.py                      http://127.0.0.1:8000, for this machine alone
    python scripts/serve.py --host 0.0.0.0       for others too: with a token, which is printed (or SFT_TOKEN)

A job is scripts/train.py (or merge_lora, export, eval, compare) in a process of its own: it goes on when the server
ends, and is found again. Queue and logs lie in outputs/.server. The routes are listed at /docs.
"""

from __future__ import annotations

import argparse
import errno
import os
import socket
from typing import Any

from sft import console


def parser() -> argparse.ArgumentParser:
    flags = console.parser(__doc__, config=False)
    add = flags.add_argument
    add("--host", default="127.0.0.1", metavar="IP", help="address to listen on (default 127.0.0.1)")
    add("--port", type=int, default=8000, metavar="N", help="port (default 8000)")
    add("--allow-host", action="append", default=[], metavar="NAME", help="a name that the server is called by")
    add("--allow-outside", action="store_true", help="configs that come by HTTP may name paths outside the project")
    add("--allow-remote-code", action="store_true", help="they may set model.trust_remote_code")
    add("--max-upload", type=float, default=2.0, metavar="GIB", help="largest file of rows (default 2)")
    return flags


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Binds the address, so that a port in use is an error at once, and serves until Ctrl-C."""
    import ipaddress
    import secrets

    import uvicorn

    from sft.errors import register_secret
    from sft.server.access import Settings
    from sft.server.api import create_app

    try:
        local = ipaddress.ip_address(args.host).is_loopback
    except ValueError:
        local = args.host == "localhost"
    token = os.environ.pop("SFT_TOKEN", "") or (None if local else secrets.token_urlsafe(24))
    settings = Settings(
        root=console.project_root(), token=token, trust_remote_code=args.allow_remote_code, outside=args.allow_outside,
        max_upload=int(args.max_upload * 2**30),
    )  # fmt: skip
    app = create_app(settings, tuple(args.allow_host))
    listener = listen(args.host, args.port)
    shown = own_address() if args.host in ("0.0.0.0", "::") else args.host
    url = f"http://{f'[{shown}]' if ':' in shown else shown}:{listener.getsockname()[1]}/"
    app.state.queue.note_address(url)
    console.say(f"{url}{f'?token={token}' if token else ''}   routes: {url}docs   stop: Ctrl-C (jobs go on)")
    if not local:
        console.say("Others can use it with that token, which travels unencrypted: use a network that you trust.")
    register_secret(token or "")  # from here on
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=3, server_header=False
    )
    uvicorn.Server(config).run(sockets=[listener])
    return {"stopped": True}


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. asyncio does not set TCP_NODELAY for it, and without that each answer takes 40 ms more."""
    from sft.errors import EnvironmentProblem

    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = str(error.strerror if isinstance(error, OSError) else error).partition(" (")[0]
        where, fix = "--port", f"another port: --port {port + 1 if 1023 < port < 65535 else 8000}"
        if isinstance(error, OSError) and error.errno not in (errno.EADDRINUSE, errno.EACCES):
            where, fix = "--host", "an address of this machine: --host 127.0.0.1, or --host 0.0.0.0 for all of them"
        raise EnvironmentProblem(f"{host}:{port} cannot be listened on: {reason}", where=where, fix=fix) from None
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # its connections inherit it
    return listener


def own_address() -> str:
    """The address with which this machine reaches others; a UDP socket that connects sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


if __name__ == "__main__":
    console.run(parser(), main)
