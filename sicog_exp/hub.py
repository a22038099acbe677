"""Whether the hub answers, asked once a load: its own libraries ask for file after file again, for minutes."""

from __future__ import annotations

TIMEOUT = 3
"""Seconds to wait for the answer."""


def silence() -> str:
    """Why the hub gives nothing now; "" where it answers."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "switched off by HF_HUB_OFFLINE"
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception as error:  # whatever its client raises: the answer is the same
        return f"{constants.ENDPOINT} does not answer ({type(error).__name__})"
    return ""
