"""A problem's result as a table: its cells, once for the terminal and for RESULTS.md, and the terminal's lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]


def seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1 or unit == "us":
            return f"{value * scale:.3g} {unit}" if value * scale < 100 else f"{value * scale:.0f} {unit}"
    raise AssertionError


def size(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def title(result: dict[str, Any]) -> tuple[str, str]:
    """(title, "T 8,192, dtype bf16"); of the result's "sizes" alone, where not everything is worth a word."""
    chosen = {key: result["shape"][key] for key in result.get("sizes", result["shape"])}
    shown = (f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in chosen.items())
    return result["title"], ", ".join(shown)


def errors(row: Row) -> str:
    """ "dx 1.0e-06, dw 2.0e-06"; what is not finite is "nan"."""
    values = {name: error["value"] for name, error in row.get("errors", {}).items()}
    return ", ".join(f"{name} {'nan' if value is None else f'{value:.1e}'}" for name, value in values.items())


def _of(key: str, form: Callable[[float], str]) -> Callable[[Row], str]:
    return lambda row: form(row[key]) if key in row else ""


_START: dict[str, Callable[[Row], str]] = {
    "time": _of("median_s", seconds),
    "IQR": lambda row: f"{(row['high_s'] - row['low_s']) / row['median_s']:.0%}",
}
_END = {"peak memory": _of("peak_bytes", size), "error": errors}
OP_COLUMNS = {
    **_START,
    "over ours": _of("times_ours", "{:.2f}x".format),
    "TFLOP/s": _of("tflops", "{:.3g}".format),
    "GB/s": _of("gbps", "{:.3g}".format),
    "over limit": _of("times_limit", "{:.2f}x".format),
    **_END,
}
STEP_COLUMNS = {
    **_START,
    "faster than the first": _of("speedup", "{:.2f}x".format),
    "by this": _of("step", "{:.2f}x".format),
    "TFLOP": _of("flops", lambda flops: f"{flops / 1e12:.3g}"),
    "TFLOP/s": _of("tflops", "{:.3g}".format),
    "tokens/s": _of("tokens_per_s", "{:,.0f}".format),
    **_END,
}
PART_COLUMNS = {
    **_START,
    "share": _of("share", "{:.1%}".format),
    "tokens": _of("tokens", "{:,}".format),
    "tokens/s": _of("tokens_per_s", "{:,.0f}".format),
    "TFLOP/s": _of("tflops", "{:.3g}".format),
    "peak memory": _of("peak_bytes", size),
}
ROLLOUT_COLUMNS = {
    **_START,
    "tokens/s": _of("tokens_per_s", "{:,.0f}".format),
    "ours over it": _of("times_ours", "{:.2f}x".format),
    "prefill": _of("prefill_s", seconds),
    "decode, tokens/s": _of("decode_tokens_per_s", "{:,.0f}".format),
    "a token of all rows": _of("token_s", seconds),
    "error": errors,
}
LOADER_COLUMNS = {
    **_START,
    "tokens/s": _of("tokens_per_s", "{:,.0f}".format),
    "tokens a CPU s": _of("tokens_per_cpu_s", "{:,.0f}".format),
    "ours over it": _of("times_ours", "{:.2f}x".format),
    "over training": _of("over_training", "{:.1f}x".format),
    "by CPU seconds": _of("over_training_cpu", "{:.1f}x".format),
}
TRAINING_COLUMNS = {
    "device, allocated": _of("peak_bytes", size),
    "device, reserved": _of("reserved_bytes", size),
    "over plan": _of("over_plan", "{:.2f}x".format),
    "host": _of("host_bytes", size),
    "host, taken": _of("host_taken_bytes", size),
    "gradient": _of("gradient_s", seconds),
    "TFLOP/s": _of("tflops", "{:.3g}".format),
    "update": _of("update_s", seconds),
    "tokens/s": _of("tokens_per_s", "{:,.0f}".format),
    "norm, first step": lambda row: f"{row['first_norm']:.4g}" if row.get("first_norm") is not None else "",
    "": lambda row: row.get("reason", "" if row["status"] == "ok" else row["status"]),
}


def _figure(name: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = row.get("extra", {}).get(name)
        return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"

    return cell


def columns(result: dict[str, Any]) -> dict[str, Callable[[Row], str]]:
    """Those of an op's problem, or of a whole step, way by way or part by part, or of training, form by form."""
    if "figures" in result:
        over = {"over ours": OP_COLUMNS["over ours"]}
        return {**_START, **over, **{name: _figure(name) for name in result["figures"]}, "error": errors}
    if result["name"] == "training":
        return TRAINING_COLUMNS
    if "parts" in result:
        return PART_COLUMNS
    if result["name"] == "rollout":
        return ROLLOUT_COLUMNS
    if result["name"] == "loader":
        return LOADER_COLUMNS
    return STEP_COLUMNS if "sizes" in result else OP_COLUMNS


def cells(result: dict[str, Any], row: Row) -> list[str]:
    """Name, then a cell a column. What has no time has its reason there, and its errors; of training, what is known."""
    found = columns(result)
    if "median_s" not in row and found is not TRAINING_COLUMNS:
        return [row["name"], row.get("reason", row["status"]), *[""] * (len(found) - 2), errors(row)]
    return [row["name"], *(cell(row) for cell in found.values())]


def launches(result: dict[str, Any]) -> str:
    """What a GPU would launch for a token, where the result says so."""
    if "launches" not in result:
        return ""
    return "launches of a token, uncaptured: {a layer} a layer, {besides} besides".format_map(result["launches"])


def lines(result: dict[str, Any], limits: dict[str, dict[str, float]]) -> list[str]:
    """Heading, one line per contender; what cannot run is a line too, with its reason."""
    limit = limits.get(str(result["shape"].get("dtype", "fp32")))
    found = ["", ": ".join(title(result))]
    if result["name"] == "training":
        return found + _grid([["", *columns(result)], *(cells(result, row) for row in result["rows"])])
    if result["status"] != "ok":
        found.append(f"  {result['status']}, no speed is shown: {result.get('reason', '')}")
    elif "checked" in result:
        found += _of_step(result)
    elif result.get("first"):
        told = ", ".join(f"{part} {seconds(value)}" for part, value in result["first"].items())
        found += [f"  optimizer: {result['held']}", f"  the first step, which compiles: {told}"]
    if launches(result):
        found.append(f"  {launches(result)}")
    if result.get("limit"):
        name, multiple = result["limit"]
        found.append(f"  limit: {name if multiple == 1 else f'{multiple:g} x {name}'}")
    timed = [cells(result, row) for row in result["rows"] if "median_s" in row]
    grid = [["", *columns(result)], *timed]
    widths = [max(map(len, column)) for column in zip(*grid)]
    widths[0] = max(len(row["name"]) for row in result["rows"]) if result["rows"] else 0

    def line(values: Sequence[str]) -> str:
        first, *rest = [f"{value:>{width}}" for value, width in zip(values, widths)]
        return "  ".join([f"  {first.strip():<{widths[0]}}", *rest[:-1], values[-1].ljust(widths[-1])])

    if timed:
        found.append(line(grid[0]).rstrip())
    for row in result["rows"]:
        values = cells(result, row)
        if "median_s" in row:
            found.append("  ".join([line(values), *_notes(row, limit, result.get("figures", ()))]))
        else:
            reason = values[1] if row["status"] != "ok" else ""
            parts = [f"  {row['name']:<{widths[0]}}", reason, values[-1], row.get("saves", "")]
            found.append("  ".join(filter(None, parts)))
    return found


def _grid(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of one width each."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  " + "  ".join(f"{value:<{width}}" for value, width in zip(row, widths)).rstrip() for row in rows]


def _of_step(result: dict[str, Any]) -> list[str]:
    size = "{layers} layers and {responses} responses".format(**result["checked"])
    stock = f"stock experts: {result['experts']}; " if "experts" in result else ""
    recompute = "recomputed" if result["shape"]["recompute"] else "kept"
    agree = f"  all ways agree in fp32 on {size}; errors are against the first"
    return [agree, f"  {stock}activations: {recompute}"]


def _notes(row: Row, limit: dict[str, float] | None, shown: Sequence[str]) -> list[str]:
    """What the terminal alone shows; ``shown``: figures that have a column."""
    found = [f"n {row['samples']}"]
    for key, bound, name in (("tflops", "matmul_tflops", "matmul"), ("gbps", "copy_gbps", "copy")):
        if limit and key in row:
            found.append(f"{row[key] / limit[bound]:.0%} of {name}")
    if "peak_bytes" in row:
        found.append(f"outputs {size(row['output_bytes'])}")
    elif "memory_reason" in row:
        found.append(f"memory not measured: {row['memory_reason']}")
    found += [f"{name} {value:.4g}" for name, value in row.get("extra", {}).items() if name not in shown]
    found += [f"no further figures: {row['extra_reason']}"] if "extra_reason" in row else []
    return found + ([row["saves"]] if "saves" in row else [])
