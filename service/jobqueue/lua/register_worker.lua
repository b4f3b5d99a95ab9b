-- Creates the groups of a worker's lanes and records that it lives. Forgets consumers that have been idle for an hour
-- and hold nothing.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- ARGV[2]  consumer, device (JSON text or ''), role, lanes. A worker of the role "all" creates no finish queues.
-- Reply    nothing
-- @include arguments
-- @include ensure_group
-- @include heartbeat

for _, lane in ipairs(args.lanes) do
  local stream = stream_key(lane)
  if args.role ~= 'all' or not string.find(lane, '+finish:', 1, true) then ensure_group(lane) end
  local known = has_group(lane) and redis.call('XINFO', 'CONSUMERS', stream, GROUP) or {}
  for _, info in ipairs(known) do
    local consumer = {}
    for j = 1, #info, 2 do consumer[info[j]] = info[j + 1] end
    if consumer.pending == 0 and consumer.idle > 3600000 then
      redis.call('XGROUP', 'DELCONSUMER', stream, GROUP, consumer.name)
    end
  end
end
heartbeat(args.consumer, args.device, args.role)
