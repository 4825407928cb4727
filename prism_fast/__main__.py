"""python -m prism_fast is prism-fast."""

from prism_fast.cli import main

main()
