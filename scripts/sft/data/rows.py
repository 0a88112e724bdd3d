"""One raw row to the record that is stored, or the fault that keeps it out."""

from __future__ import annotations

from sft.config.schema import DataSection
from sft.data import conversation, records, strict_json
from sft.data.faults import EMPTY_ANSWER, NO_USER_TURN, NOT_TEXT, UNREADABLE, RowFault
from sft.data.formats import Formats
from sft.data.raw import Raw
from sft.data.row_readers import Parsed

KEPT = ("tags", "tag", "category", "weight", "references")


def formats(data: DataSection) -> Formats:
    """The reader of rows that the config asks for."""
    columns = {role: name for role, name in data.columns if name} if data.columns else None
    return Formats(data.format, columns)


def record(raw: Raw, formats: Formats, system_prompt: str | None) -> tuple[records.Row, str]:
    """The stored row and the format it came in. Raises RowFault."""
    if raw.fault is not None:
        raise RowFault(UNREADABLE, raw.fault)
    parsed = formats.parse(raw.value)
    extra = {key: raw.value[key] for key in KEPT if raw.value.get(key) is not None}
    if raw.value.get("id") is not None:
        extra["source_id"] = raw.value["id"]
    if parsed.references:
        extra["references"] = list(parsed.references)
    try:
        return _stored(parsed, raw.origin, system_prompt, extra), parsed.format
    except TypeError as error:
        raise RowFault(NOT_TEXT, str(error)) from None


def _stored(parsed: Parsed, origin: str, system_prompt: str | None, extra: records.Row) -> records.Row:
    if parsed.pair:
        source, target = parsed.pair
        if not source.strip():
            raise RowFault(NO_USER_TURN, "input is empty")
        if not target.strip():
            raise RowFault(EMPTY_ANSWER, "target is empty")
        return records.rendered_record(*parsed.pair, origin=origin, **extra)
    messages = parsed.messages
    if system_prompt and messages and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    conversation.check(messages)
    return records.to_record(messages, parsed.tools, origin=origin, **extra)


def line(record: records.Row) -> bytes:
    """The record as a line of JSON. Raises RowFault for what JSON cannot hold."""
    try:
        return strict_json.dumps(record) + b"\n"
    except (TypeError, ValueError) as error:
        raise RowFault(NOT_TEXT, str(error)) from None
