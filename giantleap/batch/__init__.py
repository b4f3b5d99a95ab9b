"""Bulk work without a service: rows of files in, files out, by any number of processes that share only the output.

`giantleap.cli.batch` is the command, `giantleap.batch.runner` its loop, `giantleap.batch.ray` the same for Ray Data.
"""
