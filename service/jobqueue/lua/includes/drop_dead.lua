-- @include prefix

-- Removes a job from the dead-letter stream; returns whether it was there.
local function drop_dead(id)
  for _, entry in ipairs(redis.call('XRANGE', prefix .. ':dead', '-', '+')) do
    if entry[2][2] == id then return redis.call('XDEL', prefix .. ':dead', entry[1]) == 1 end
  end
  return false
end
