-- Forgets a worker. A consumer that still holds messages stays: deleting it would lose them.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- ARGV[2]  consumer, role, lanes
-- Reply    nothing
-- @include prefix
-- @include arguments
-- @include has_group

local consumer = args.consumer
redis.call('ZREM', prefix .. ':workers', consumer)
redis.call('ZREM', prefix .. ':workers:' .. args.role, consumer)
redis.call('HDEL', prefix .. ':devices', consumer)
for _, lane in ipairs(args.lanes) do
  local stream = stream_key(lane)
  if has_group(lane) and #redis.call('XPENDING', stream, GROUP, '-', '+', 1, consumer) == 0 then
    redis.call('XGROUP', 'DELCONSUMER', stream, GROUP, consumer)
  end
end
