"""`python -m giantleap` is the `giantleap` command."""

from giantleap.cli.main import main

main()
