-- @include paid_us
-- Takes the time of a cost from an allowance; a cost below 0 gives it back. The key expires when nothing is owed.
local function pay(key, cost_us)
  local until_us = paid_us(key) + cost_us
  if until_us <= now_us then return redis.call('UNLINK', key) end
  redis.call('SET', key, string.format('%.0f', until_us), 'PX', math.ceil((until_us - now_us) / 1000))
end
