"""What a model is and how it runs. Imports nothing from the rest of the project; start at
`giantleap.models.route.Route`."""
