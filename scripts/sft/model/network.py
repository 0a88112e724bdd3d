"""Is there a hub to ask, and may it be asked."""

from __future__ import annotations

import threading


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids the network."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def reachable(timeout: float = 2.0) -> bool:
    """Whether the hub answers within `timeout` seconds, name lookup included; false when HF_HUB_OFFLINE is set."""
    if offline():
        return False
    answers: list[bool] = []

    def ask() -> None:
        import httpx
        from huggingface_hub import constants

        try:
            answers.append(httpx.head(constants.ENDPOINT, timeout=timeout).status_code < 500)
        except Exception:  # no proxy, no route, no certificate: all mean no
            answers.append(False)

    asker = threading.Thread(target=ask, daemon=True)
    asker.start()
    asker.join(timeout)
    return bool(answers and answers[0])
