"""Chats with a model, or answers a file of questions, with the template and stop criteria of its training.

python scripts/infer.py                                                       a chat with the newest run
python scripts/infer.py --base --set generation.temperature=0.7 --set generation.do_sample=true
python scripts/infer.py --mode batch --input_file q.txt --output_file a.txt   a line a question (or .jsonl)
python scripts/infer.py --mode requests --json                                JSON lines in, answers out as they grow
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from sft import console


def parser() -> argparse.ArgumentParser:
    flags = console.parser(__doc__)
    add = flags.add_argument
    add("--mode", choices=["interactive", "batch", "requests"], help="default: batch with --input_file")
    add("--input_file", type=Path, metavar="F", help="questions: .txt (lines) or .jsonl (rows)")
    add("--output_file", type=Path, metavar="F", help="answers: .txt or .jsonl")
    add("--adapters", type=Path, metavar="DIR", help="an adapter (default: the newest run's)")
    add("--base", action="store_true", help="only the base model")
    add("--merged", type=Path, metavar="DIR", help="a folder of merged weights")
    add("--system", metavar="TEXT", help="system text (default: the one the run was trained with)")
    return flags


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    """Choose the model, read the questions, open the model, answer."""
    from sft.errors import ConfigError
    from sft.generation import batch_io, load

    root = console.project_root()
    if args.mode == "requests":
        return answer_requests(args, root)
    batch = args.mode == "batch" or (args.mode is None and args.input_file is not None)
    if batch and (args.input_file is None or args.output_file is None):
        raise ConfigError("batch mode needs --input_file and --output_file", fix="name both")
    target = load.resolve_model(
        Path(args.config), args.set, adapters=args.adapters, merged=args.merged, base=args.base,
        is_default=args.config == console.default_config(), root=root,
    )  # fmt: skip
    system = args.system if args.system is not None else load.system_text(target.config, target.folder, root)
    requests = batch_io.read(args.input_file, system) if batch else []
    adapter, merged = (None, None) if args.base else (target.adapter, target.merged)
    low_memory: load.LowMemory | None = None if batch else "4bit"
    loaded = load.open_model(target.config, adapter=adapter, merged=merged, root=root, low_memory=low_memory)
    if not batch:
        chat(loaded, target.config.generation, system, root)
        return None
    with console.progress("answering") as advance:
        answers = load.answer_all(loaded, [request.row for request in requests], target.config, advance)
    batch_io.write(args.output_file, requests, answers)
    written = [answer for answer in answers if answer is not None]
    stopped = sum(answer.stopped for answer in written)
    console.say(f"{len(written)} answers in {args.output_file}; {stopped} stopped by themselves")
    return {"rows": len(written), "stopped": stopped, "output_file": str(args.output_file)}


def answer_requests(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Answers the requests on stdin, of any of the models, until its end."""
    from sft.errors import ConfigError
    from sft.generation.requests import Models, serve

    if args.adapters or args.merged or args.base or args.system is not None:
        what = "--adapters, --merged, --base and --system do not go with --mode requests"
        raise ConfigError(what, fix='leave them out: a request names its model, e.g. {"model": "base", ...}')
    is_default = args.config == console.default_config()
    return serve(sys.stdin, console.emit, Models(Path(args.config), args.set, is_default=is_default, root=root))


def chat(loaded: Any, settings: Any, system: str | None, root: Path) -> None:
    """The conversation, until /exit."""
    from sft.generation.chat import ChatSession, line_reader, on_terminal

    def markdown(text: str) -> None:
        from rich.markdown import Markdown

        console.out().print(Markdown(text), soft_wrap=False)

    def show_status(text: str) -> None:
        console.write(f"\r\x1b[2K{text}\r" if text else "\r\x1b[2K")

    terminal = on_terminal()
    session = ChatSession(
        loaded.stream, console.write, settings=settings, system=system, save_path=root / "outputs" / "chat.jsonl",
        count_tokens=lambda messages: len(loaded.encoder.prompt(messages)),
        render=lambda messages: loaded.tokenizer.decode(loaded.encoder.prompt(messages)),
        base=loaded.stream_base if loaded.adapted else None,
        side_by_side=lambda base, tuned: console.table("", ["base", "tuned"], [[base, tuned]], text=True),
        markdown=markdown if terminal else None, status=show_status if terminal else lambda _: None,
    )  # fmt: skip
    name = str(loaded.name).removeprefix(f"{root}/")
    console.say(f"{name} on {loaded.device}; /help lists the commands")
    if system:
        console.say(f"system: {system}")
    session.run(line_reader(root / "outputs" / ".chat_history"))


if __name__ == "__main__":
    console.run(parser(), main)
