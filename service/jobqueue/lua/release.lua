-- Returns a claimed job unstarted. Its message goes to a consumer that no worker is, so old that it is stale at once:
-- the next worker takes it before anything else. The delivery is not counted.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- ARGV[2]  the claim (see claim_fence)
-- Reply    status: done, canceled, lost
-- @include settle_canceled
-- @include ensure_group
-- @include position

local id, lane = args.id, args.lane
if not owns_claim() then return reply_not_owned() end
if end_if_overdue('{}') then return reply('done') end
local canceled = settle_canceled('{}')
if canceled then return canceled end
ensure_group(lane)
redis.call('XCLAIM', stream_key(lane), GROUP, 'released', 0, get(id, 'message') or args.message,
  'IDLE', 86400000 + config.visibility_ms, 'FORCE', 'JUSTID')
redis.call('HDEL', job_key(id), 'worker', 'message')
redis.call('SREM', prefix .. ':running', id)
redis.call('HINCRBY', job_key(id), 'deliveries', -1)
redis.call('HSET', job_key(id), 'state', 'queued')
redis.call('ZADD', prefix .. ':queued:' .. lane, get(id, 'queued_us'), id)
add_event(id, 'queued', string.format('{"position":%d}', position(id)))
return reply('done')
