-- The hash tag of the deployment. Every key name is built from it, so that all keys share one Cluster slot.
local prefix = KEYS[1]
