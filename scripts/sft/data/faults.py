"""Why a row is not used: the closed list of reasons that the ledger counts, and the exception that carries one."""

from __future__ import annotations

UNREADABLE = "unreadable"
UNKNOWN_FORMAT = "unknown format"
NOT_TEXT = "not text"
NO_USER_TURN = "no user turn"
EMPTY_ANSWER = "empty answer"
UNKNOWN_ROLE = "unknown role"
OUT_OF_ORDER = "roles out of order"
DUPLICATE = "exact duplicate"
NEAR_DUPLICATE = "near duplicate"
LEAK = "leak into val or test"
CONTAMINATION = "contamination"
DROPS = {  # data.drop's names -> the reason in the ledger
    "control_characters": "control characters",
    "boilerplate": "boilerplate",
    "length_outliers": "length outlier",
    "language": "other language",
}

FAULTS = (UNREADABLE, UNKNOWN_FORMAT, NOT_TEXT, NO_USER_TURN, EMPTY_ANSWER, UNKNOWN_ROLE, OUT_OF_ORDER)
ASKED_FOR = (
    DUPLICATE,
    NEAR_DUPLICATE,
    LEAK,
    CONTAMINATION,
    *DROPS.values(),
)  # dropped because the config asks for it: named and counted, but no fault of the row
REASONS = FAULTS + ASKED_FOR


class RowFault(Exception):
    """One row cannot be used. reason: one of REASONS. detail: what exactly, for the person who reads the quarantine."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail
