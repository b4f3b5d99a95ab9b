-- @include job_key
local function get(id, field) return redis.call('HGET', job_key(id), field) end
