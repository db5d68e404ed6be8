"""Keys and tokens: they stand in environment variables, and nowhere that is written or shown."""

import os
import re

SECRET = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)
SHORTEST = 8  # characters; a shorter value may be any word
HIDDEN = "***"
_named: set[str] = set()  # variables that a configuration names, whatever they are called


def secrets() -> dict[str, str]:
    """Environment variables whose names say that their values are secret, and the values; longest first."""
    found = {name: value.strip() for name, value in os.environ.items() if name in _named or SECRET.search(name)}
    named = [(name, value) for name, value in found.items() if len(value) >= SHORTEST and not os.path.exists(value)]
    return dict(sorted(named, key=lambda pair: -len(pair[1])))


def read_secret(variable: str) -> str:
    """The value of an environment variable, which is a secret from now on; "" where it is not set."""
    _named.add(variable)
    return os.environ.get(variable, "").strip()


def hide(text: str) -> str:
    """A text without the values of secret environment variables."""
    for value in secrets().values():
        text = text.replace(value, HIDDEN)
    return text
