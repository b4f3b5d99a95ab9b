-- @include prefix
-- @include group

-- XACK and XDEL together: the length of the stream stays the number of queued and running jobs.
local function drop_message(lane, message)
  redis.call('XACK', prefix .. ':stream:' .. lane, GROUP, message)
  redis.call('XDEL', prefix .. ':stream:' .. lane, message)
end
