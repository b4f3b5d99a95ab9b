"""The images of a /generate job: the one that it starts from, its mask, and those that the prompt talks about."""
