"""`python -m cluster` is the `slipstream` command."""

from cluster.cli import main

main()
