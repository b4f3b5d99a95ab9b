-- @include prefix
-- @include config
-- @include clock

-- Records that a worker lives and which device it has; forgets the workers that have been silent for long.
local function heartbeat(consumer, device, role)
  local sets = {prefix .. ':workers'}
  if role ~= 'all' then sets[2] = prefix .. ':workers:' .. role end
  for _, key in ipairs(sets) do
    redis.call('ZREMRANGEBYSCORE', key, '-inf', now_ms - 10 * config.visibility_ms)
    redis.call('ZADD', key, now_ms, consumer)
    redis.call('PEXPIRE', key, 10 * config.visibility_ms)
  end
  if device ~= '' then redis.call('HSET', prefix .. ':devices', consumer, device) end
  for _, known in ipairs(redis.call('HKEYS', prefix .. ':devices')) do
    if not redis.call('ZSCORE', prefix .. ':workers', known) then redis.call('HDEL', prefix .. ':devices', known) end
  end
  redis.call('PEXPIRE', prefix .. ':devices', 10 * config.visibility_ms)
end
