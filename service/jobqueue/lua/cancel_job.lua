-- Requests that a job stops; a queued one is canceled at once. Its message stays, because deleting one that was never
-- delivered makes the lag of the group unknown; the worker that meets the message drops it.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- ARGV[2]  id
-- Reply    the record (`StoredJob`), or nothing if the job is unknown
-- @include arguments
-- @include close_job
-- @include is_final
-- @include read_record

local id = args.id
local state = get(id, 'state')
if not state then return nil end
if not is_final(state) then
  redis.call('HSET', job_key(id), 'cancel', 1)
  if state == 'queued' then close_job(id, 'canceled', '{}') end
end
return cjson.encode(read_record(id))
