-- @include close_job
-- @include is_overdue
local function close_overdue(id, stages)
  local detail = 'The job did not end within the ' .. get(id, 'cancel_after') .. ' s of its Cancel-After.'
  redis.call('HSET', job_key(id), 'error', cjson.encode({code = 'deadline_passed', detail = detail, retryable = false}))
  close_job(id, 'failed', stages)
end
