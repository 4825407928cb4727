"""A problem's result as lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1 or unit == "us":
            return f"{value * scale:.3g} {unit}" if value * scale < 100 else f"{value * scale:.0f} {unit}"
    raise AssertionError


def size(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def shape(values: dict[str, Any], sizes: Sequence[str] | None = None) -> str:
    """ "T 8,192, dtype bf16"; of ``sizes`` alone, where not everything is worth a word."""
    chosen = {key: values[key] for key in sizes or values}
    return ", ".join(
        f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in chosen.items()
    )


def error_text(row: dict[str, Any]) -> str:
    """ "dx 1.0e-06, dw 2.0e-06"; what is not finite is "nan"."""
    values = {name: error["value"] for name, error in row.get("errors", {}).items()}
    return ", ".join(f"{name} {'nan' if value is None else f'{value:.1e}'}" for name, value in values.items())


def problem_lines(result: dict[str, Any], limits: dict[str, float] | None) -> list[str]:
    """Heading, one line per contender; what cannot run is a line too, with its reason."""
    lines = [f"\n{result['title']}: {shape(result['shape'])}"]
    if result["status"] != "ok":
        lines.append(f"  {result['status']}, no speed is shown: {result.get('reason', '')}")
    width = max((len(row["name"]) for row in result["rows"]), default=0)
    for row in result["rows"]:
        lines.append(f"  {row['name']:<{width}}  {_row(result, row, limits)}")
    return lines


def _row(result: dict[str, Any], row: dict[str, Any], limits: dict[str, float] | None) -> str:
    errors = f"error {error_text(row)}" if row.get("errors") else ""
    if row["status"] != "ok":
        return "  ".join(filter(None, [row.get("reason", row["status"]), errors]))
    if "median_s" not in row:
        return errors
    spread = (row["high_s"] - row["low_s"]) / row["median_s"]
    parts = [f"{seconds(row['median_s']):>8} (IQR {spread:4.0%}, n {row['samples']})"]
    parts.append(f"{row['times_ours']:5.2f}x ours" if "times_ours" in row else " " * 10)
    if row["role"] != "limit":
        parts.append(f"{row['tflops']:.3g} TFLOP/s {row['gbps']:.3g} GB/s")
        if limits:
            compute, copy = row["tflops"] / limits["matmul_tflops"], row["gbps"] / limits["copy_gbps"]
            parts.append(f"{compute:.0%} of matmul {copy:.0%} of copy")
        if "times_limit" in row:
            parts.append(f"{row['times_limit']:.2f}x {_limit(result['limit'])}")
    if "peak_bytes" in row:
        parts.append(f"peak {size(row['peak_bytes'])} (outputs {size(row['output_bytes'])})")
    elif "memory_reason" in row:
        parts.append(f"memory not measured: {row['memory_reason']}")
    parts += [f"{name} {value:.4g}" for name, value in row.get("extra", {}).items()]
    return "  ".join([*parts, *filter(None, [errors])])


def _limit(limit: list) -> str:
    name, multiple = limit
    return name if multiple == 1 else f"({multiple:g} x {name})"
