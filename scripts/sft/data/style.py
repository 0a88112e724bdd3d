"""Style: one system text over all rows; it replaces theirs, is put before or after it, or fills in."""

from __future__ import annotations

import logging
from pathlib import Path

from sft import files
from sft.config.load import resolve_path
from sft.config.schema import DataSection
from sft.data import store
from sft.data.rows import Row, dump_json, is_pair, is_rendered, messages, prompt_of_pair
from sft.errors import DataError, nearest

log = logging.getLogger(__name__)

PRESETS = {
    "concise": "Answer in at most two short sentences. Leave out introductions, lists and headings.",
    "json": "Answer with one valid JSON value and nothing else: no explanation, no code fence.",
    "step-by-step": "Work the answer out step by step, one numbered step a line, and end with the result.",
    "structured": "Answer in Markdown: a one-line summary first, then short headed sections with bullet points.",
}


def style_text(style: str) -> str:
    """The preset of that name, else the text itself. Raises DataError for one word, or nearly a preset's name."""
    if style in PRESETS:
        return PRESETS[style]
    close = nearest(style.lower(), PRESETS, 0.75)
    if close or not style.strip() or (style.isascii() and len(style.split()) < 2):
        what = f"there is no preset {style!r}" if style.strip() else "the style is empty"
        hint = f"did you mean {close}? " if close else ""
        own = "or a sentence of your own: --style 'Answer in a funny tone.'"
        raise DataError(what, fix=f"{hint}presets: {', '.join(PRESETS)}; {own}")
    return style


def system_text(row: Row) -> str:
    """The row's system text, "" if it has none."""
    turns = messages(row)
    return str(turns[0]["content"] or "") if turns and turns[0]["role"] == "system" else ""


def apply_style(row: Row, style: str, mode: str) -> Row:
    """The row with the style in its system text; its id stays, since it is the same row."""
    turns, system = prompt_of_pair(row) if is_pair(row) else messages(row), system_text(row)
    first = turns[0] if turns and turns[0]["role"] == "system" else None
    text = {
        "replace": style,
        "prepend": f"{style}\n\n{system}" if system else style,
        "append": f"{system}\n\n{style}" if system else style,
        "fill": system or style,
    }[mode]
    if "messages" not in row and not is_pair(row):
        return {**row, "system": text}
    head = {**(first or {"role": "system"}), "content": text}
    row = {key: value for key, value in row.items() if key != "prompt"}
    return {**row, "messages": [head, *(turns[1:] if first else turns)]}


def style_file(source: Path, target: Path, style: str, mode: str) -> int:
    """Styles one file of rows into another and records its source beside it; returns the number of rows.

    Logs how many rows lose a system text of their own (mode `replace`).
    """
    if source.resolve() == target.resolve():
        raise DataError("--in and --out are the same file", where=str(source), fix="name another --out")
    rows = lost = 0
    try:
        digest = files.sha256(source) if source.exists() else ""
        with files.atomic_file(target) as staged, staged.open("wb") as out:
            for row in store.iter_rows(source):
                if is_rendered(row):
                    fix = "style the processed rows, then render again: make style render"
                    raise DataError("rendered rows have no system text to style", where=str(source), fix=fix)
                out.write(dump_json(apply_style(row, style, mode)) + b"\n")
                rows += 1
                lost += mode == "replace" and system_text(row) not in ("", style)
        store.record_style(target, source, digest, style=style, mode=mode)
    except OSError as error:
        where = str(error.filename or target)
        raise DataError(f"cannot write: {error.strerror or error}", where=where, fix="name another --out") from None
    if lost:
        keep = 'to keep it too: --mode prepend; with make: ARGS="--mode prepend"'
        log.warning("%s: the style replaces the system text of %d rows (%s)", target.name, lost, keep)
    return rows


def style_folder(data: DataSection, root: Path, style: str, mode: str) -> dict[str, int]:
    """Styles every processed split; the styled folder changes as a whole. Returns split -> rows."""
    processed, target = resolve_path(root, data.processed_dir), resolve_path(root, data.styled_dir)
    present = [name for name in store.SPLITS if (processed / f"{name}.jsonl").exists()]
    if "train" not in present:
        raise DataError("there are no processed rows", where=str(processed / "train.jsonl"), fix="make process")
    if processed.resolve() == target.resolve():
        fix = "--set data.styled_dir=data/processed_with_style"
        raise DataError("data.styled_dir and data.processed_dir are one folder", where=str(target), fix=fix)
    own_files = {f"{name}.jsonl" for name in store.SPLITS} | {store.STYLE_RECORD}
    with store.replace_dir(target, own_files, "data.styled_dir") as staged:
        files_of = {name: (processed / f"{name}.jsonl", staged / f"{name}.jsonl") for name in present}
        return {name: style_file(source, out, style, mode) for name, (source, out) in files_of.items()}
