-- @include prefix
-- @include config
-- @include clock

-- The number of live workers, or of those of one role.
local function live_workers(role)
  local key = role and prefix .. ':workers:' .. role or prefix .. ':workers'
  return redis.call('ZCOUNT', key, now_ms - config.visibility_ms, '+inf')
end
