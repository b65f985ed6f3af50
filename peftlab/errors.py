"""The one error for bad input: a line that names the key, the value and what is allowed."""


class InputError(ValueError):
    """Input that the user can correct; the command prints it as one line and exits with code 2."""


def require(ok: bool, key: str, value: object, allowed: str) -> None:
    """Raise InputError("key=value: allowed") unless `ok`."""
    if not ok:
        raise InputError(f"{key}={value}: {allowed}")
