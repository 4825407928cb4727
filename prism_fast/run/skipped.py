"""Updates that were skipped, as something was not finite: how many in a row, and of which records."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from prism_fast import metric_names as names
from prism_fast import ranks
from prism_fast.records import DataError, Fault
from prism_fast.run.saving import REMEDY

FILE_NAME = "skipped_updates.jsonl"  # in run.out: the batches that could not be learned from


class SkippedUpdates:
    """Of a run in the folder ``out`` that ends after ``most`` in a row; 0: it goes on."""

    def __init__(self, out: Path, most: int):
        self.file, self.most = out / FILE_NAME, most
        self.in_a_row = 0

    @property
    def too_many(self) -> bool:
        return 0 < self.most <= self.in_a_row

    def count(self, step: int, fault: Fault | None, warn: Callable[[str], None]) -> dict[str, float]:
        """How many updates in a row were skipped, if any; the records of this one's batch are written down."""
        if fault is None:
            self.in_a_row = 0
            return {}
        self.in_a_row += 1
        if ranks.is_first():
            line = json.dumps({"step": step, "what": fault.what, "records": fault.records})
            try:
                with open(self.file, "a", encoding="utf-8") as file:
                    file.write(f"{line}\n")
            except OSError as error:
                warn(f"step {step}: {self.file}: cannot be written ({error.strerror}); {REMEDY}")
        return {names.SKIPPED_UPDATES: float(self.in_a_row)}

    def error(self, step: int, fault: Fault | None, saved: str) -> DataError:
        """What ends the run at ``step``, where there are too many; ``saved``: the last checkpoint."""
        return DataError(
            f"{self.file.parent}: {self.in_a_row} updates in a row were skipped, the last as {fault and fault.what}; "
            f"stopped at step {step}, last saved {saved}, their records are in {self.file}; lower the "
            "learning rate, or set run.max_skipped_updates=0 to go on anyway"
        )
