-- @include prefix
-- @include config
-- @include clock

-- Notes that Redis serves, and returns since when it does. While it hung or was away nobody could renew a lease: after
-- a silence of half a visibility timeout all owners get the time to do so before a claim counts as stale.
local function serves_since_ms()
  local seen, resumed = prefix .. ':seen_ms', prefix .. ':resumed_ms'
  local silent_ms = now_ms - tonumber(redis.call('GET', seen) or 0)
  if silent_ms > config.visibility_ms / 8 then redis.call('SET', seen, string.format('%.0f', now_ms)) end
  if silent_ms > config.visibility_ms / 2 and silent_ms < now_ms then
    redis.call('SET', resumed, string.format('%.0f', now_ms), 'PX', 2 * config.visibility_ms)
  end
  return tonumber(redis.call('GET', resumed) or 0)
end
