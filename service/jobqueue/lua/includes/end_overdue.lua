-- @include close_overdue
-- @include is_final

-- Fails every job whose deadline has passed. A worker that runs one finds out at its next step.
local function end_overdue()
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', prefix .. ':deadlines', '-inf', now_ms, 'LIMIT', 0, 100)) do
    local state = get(id, 'state')
    if state and not is_final(state) then close_overdue(id, '{}') end
    redis.call('ZREM', prefix .. ':deadlines', id)  -- also if the record is gone: it must not stop every claim
  end
end
