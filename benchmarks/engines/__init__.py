"""LUA engines on a CPU: speed against the published SwinIR forward."""
