"""What the integrations share: which versions of a host were tested."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version


def check_version(package: str, tested: Sequence[str], untested: bool) -> None:
    """Raises RuntimeError where the installed version of ``package`` begins with none of ``tested``, unless it may."""
    found = version(package)
    if untested or any(found == known or found.startswith(f"{known}.") for known in tested):
        return
    raise RuntimeError(
        f"{package} {found}: tested with {', '.join(tested)}; install one of these, or insist with untested=True "
        "(what is replaced is still compared with the host's own)"
    )
