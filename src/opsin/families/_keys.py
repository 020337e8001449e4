"""Keys of published config files that nobody reads: harmless, or able to change the numbers."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from opsin.errors import ConfigError, nearest
from opsin.families._family import HubConfig


def refuse_unread(
    hub: HubConfig,
    *,
    neutral: Mapping[str, tuple[Any, ...]],
    read: Collection[str],
    suspicious: re.Pattern[str],
    where: str,
) -> None:
    """Raise ConfigError for a key that may change the numbers and that nobody reads.

    neutral: keys that are served at these values only. read: keys that the caller reads, or knows to be harmless.
    suspicious: what a key that changes the numbers begins with. where: the file, for the message.
    """
    for key, value in hub.items():
        if key in neutral:
            if value not in neutral[key]:
                only = " or ".join(repr(allowed) for allowed in neutral[key] if allowed is not None) or "null"
                raise ConfigError(f"{where}: {key} {value!r} changes what the model computes; only {only} is served")
        elif key not in read and suspicious.match(key) and value not in (None, False, [], {}):
            raise ConfigError(
                f"{where}: key {key!r} (value {value!r}) is not known and may change what the model computes"
                f"{nearest(key, (*read, *neutral))}. Remove it if you know that it does not"
            )
