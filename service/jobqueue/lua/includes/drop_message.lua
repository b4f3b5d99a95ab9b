-- @include group
-- @include stream_key

-- XACK and XDEL together: the length of the stream stays the number of queued and running jobs.
local function drop_message(lane, message)
  redis.call('XACK', stream_key(lane), GROUP, message)
  redis.call('XDEL', stream_key(lane), message)
end
