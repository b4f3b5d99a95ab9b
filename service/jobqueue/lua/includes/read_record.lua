-- @include clock
-- @include estimate_start_s
-- @include position
-- @include stored_fields

-- A record as `StoredJob` reads it; nil if the job is unknown.
local function read_record(id)
  local job, deadline_ms = unpack(redis.call('HMGET', job_key(id), 'job', 'deadline_ms'))
  if not job then return nil end
  local record, rank = stored_fields(id), position(id)
  record.job = job
  record.queue_position = rank
  record.estimated_start_s = rank and estimate_start_s(id, rank)
  record.deadline_left_ms = deadline_ms and tonumber(deadline_ms) - now_ms or nil
  return record
end
