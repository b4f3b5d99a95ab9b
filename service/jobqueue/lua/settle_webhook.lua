-- Ends an attempt at a delivery, unless another sender has taken it meanwhile.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- ARGV[2]  id, attempt, outcome (delivered, retried, dropped), delay_ms until the next attempt, reason
-- Reply    nothing
-- @include prefix
-- @include arguments
-- @include clock

local delivery, key = args.id, prefix .. ':webhook:' .. args.id
if tonumber(redis.call('HGET', key, 'attempts') or -1) ~= args.attempt then return end
if args.outcome == 'retried' then
  redis.call('ZADD', prefix .. ':webhooks', now_ms + args.delay_ms, delivery)
  return
end
redis.call('ZREM', prefix .. ':webhooks', delivery)
redis.call('UNLINK', key)
if args.outcome == 'dropped' then
  redis.call('XADD', prefix .. ':webhooks_dead', 'MAXLEN', '~', 1000, '*', 'delivery', delivery, 'reason', args.reason)
end
