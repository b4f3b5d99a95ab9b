"""The `giantleap` command. Start at `giantleap.cli.main`."""
