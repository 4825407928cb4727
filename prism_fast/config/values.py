"""The base of all settings, and what one value may be: kinds of numbers and paths, with their bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from prism_fast.settings import got

MIN_TEMPERATURE = 0.01  # logits divided by less leave the range of their numbers


class Node(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {got(value)}")
    return value


def _place(value: Any) -> Any:
    """A path as people write it: not empty, ~ is the home folder."""
    if not isinstance(value, (str, Path)):
        quoted = " (in quotes it is one)" if isinstance(value, (int, float)) else ""
        raise ValueError(f"expected a path, got {got(value)}{quoted}")
    text = str(value)
    if not text.strip() or not text.replace(" ", "").isprintable():
        raise ValueError(f"expected a path, got {got(value)}")
    try:
        return Path(value).expanduser() if text.startswith("~") else value
    except RuntimeError as error:
        raise ValueError(f"{got(value)}: {error}") from None


def _places(value: Any) -> Any:
    return [value] if isinstance(value, (str, Path)) else value


def _temperature(value: float) -> float:
    if 0 < value < MIN_TEMPERATURE:
        raise ValueError(f"expected 0 (the most probable token) or at least {MIN_TEMPERATURE}, got {value}")
    return value


NUMBER = BeforeValidator(_no_truth)  # after the bounds: it hides from the JSON schema what comes after it
Place = Annotated[Path, BeforeValidator(_place)]
Places = Annotated[tuple[Place, ...], BeforeValidator(_places)]
Count = Annotated[int, Field(ge=1, le=10**9), NUMBER]
Steps = Annotated[int, Field(ge=1, le=10**8), NUMBER]
Epochs = Annotated[float, Field(gt=0, le=10**4), NUMBER]
Every = Annotated[int, Field(ge=0, le=10**8), NUMBER]
Batch = Annotated[int, Field(ge=1, le=2**16), NUMBER]
Tokens = Annotated[int, Field(ge=1, le=2**20), NUMBER]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1), NUMBER]  # stages derive others from it, and all fit 63 bits
Share = Annotated[float, Field(ge=0, le=1), NUMBER]
Part = Annotated[float, Field(ge=0, lt=1), NUMBER]
Small = Annotated[float, Field(ge=0, le=10), NUMBER]
Samples = Annotated[int, Field(ge=1, le=4096), NUMBER]
Weight = Annotated[float, Field(ge=0, le=1000), NUMBER]
Price = Annotated[float, Field(ge=0, le=1e9), NUMBER]
Temperature = Annotated[float, Field(ge=0, le=100), NUMBER, AfterValidator(_temperature)]
Positive = Annotated[float, Field(ge=MIN_TEMPERATURE, le=100), NUMBER]
