-- Forgets a worker. A consumer that still holds messages stays: deleting it would lose them.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- ARGV[2]  consumer, role, lanes
-- Reply    nothing
-- @include prefix
-- @include arguments
-- @include group

local consumer = args.consumer
redis.call('ZREM', prefix .. ':workers', consumer)
redis.call('ZREM', prefix .. ':workers:' .. args.role, consumer)
redis.call('HDEL', prefix .. ':devices', consumer)
for _, lane in ipairs(args.lanes) do
  local stream = prefix .. ':stream:' .. lane
  if redis.call('EXISTS', stream) == 1 and #redis.call('XPENDING', stream, GROUP, '-', '+', 1, consumer) == 0 then
    redis.call('XGROUP', 'DELCONSUMER', stream, GROUP, consumer)
  end
end
