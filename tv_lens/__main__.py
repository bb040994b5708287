"""`python -m tv_lens` is `tv-lens`."""

from tv_lens.cli import main

main()
