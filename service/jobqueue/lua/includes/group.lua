-- The consumer group of every stream.
local GROUP = 'workers'
