-- @include job_key

-- The fields of a job's hash from which Python builds a record (`StoredJob`), without the job itself.
local function stored_fields(id)
  local names = {
    'state', 'deliveries', 'created_at_s', 'started_at_s', 'finished_at_s', 'stages', 'results', 'warnings', 'error',
    'cancel',
  }
  local values, fields = redis.call('HMGET', job_key(id), unpack(names)), {}
  for i, name in ipairs(names) do fields[name] = values[i] or nil end
  return fields
end
