"""The command prism-fast, and `python -m prism_fast`."""

from __future__ import annotations

import os
import signal


def _stop_at_once(signum: int, frame: object) -> None:
    """Ctrl-C while libraries are imported: as an exception it would be a traceback of theirs, or abort torch."""
    os.write(2, b"stopped; what was not saved by a checkpoint is lost\n")
    os._exit(128 + signum)


def main() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop_at_once)
    from prism_fast.cli import main as run

    run()


if __name__ == "__main__":
    main()
