-- @include close_job
-- @include is_final
-- @include read_record

-- Sets the flag of a job that has not ended, and ends it if it waits. Its message stays, because deleting one that was
-- never delivered makes the lag of the group unknown; the worker that meets the message drops it.
local function request_cancel(id)
  local state = get(id, 'state')
  if is_final(state) then return end
  redis.call('HSET', job_key(id), 'cancel', 1)
  if state == 'queued' then close_job(id, 'canceled', '{}') end
end
