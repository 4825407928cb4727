"""Production configurations, for the compile gate."""

from prism_kernels.compile_gate import Configuration
from prism_kernels.tree_attention import decode_cases


def configurations() -> list[Configuration]:
    return decode_cases.configurations()
