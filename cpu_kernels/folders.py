"""Where a user keeps what can be made again, such as compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path | None:
    """XDG_CACHE_HOME, else ~/.cache; None for a user without a home: HOME unset, and no entry among the users.

    The folder need not exist, nor be one that can be written.
    """
    for place in (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")):
        if os.path.isabs(place):  # the XDG specification has relative ones ignored
            return Path(place)
    return None
