"""Trainings that are compared with each other: minutes to half an hour of one core each."""
