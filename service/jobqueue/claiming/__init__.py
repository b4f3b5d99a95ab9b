"""How a worker gets jobs: the claim with its inputs, and what it does while Redis is away."""
