"""The models and how they run: start at `giantleap.models.route.Route`.

Imports nothing from the rest of the project.
"""
