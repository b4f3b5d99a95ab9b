-- Deletes a job that has ended: its results, input, events and all that it holds of its caller. A job that has not
-- ended is canceled instead. The record stays without content until it expires, so that its id is not used again: the
-- message of a job that was canceled while it waited may still be in its stream.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- ARGV[2]  id, purged (the caller has deleted the files of the job in the result store)
-- Reply    record (`StoredJob`) of a job that was canceled; keys of the files to delete first, or nothing if the
--          job was deleted or is unknown
-- @include arguments
-- @include drop_dead
-- @include free_results
-- @include request_cancel

local id = args.id
local state = get(id, 'state')
if not state then return '{}' end
if not is_final(state) then
  request_cancel(id)
  return cjson.encode({record = read_record(id)})
end

local keys = {}
for _, file in ipairs(cjson.decode(get(id, 'results') or '[]')) do
  if type(file.key) == 'string' then keys[#keys + 1] = file.key end
end
keys[#keys + 1] = get(id, 'input_key') or nil
if #keys > 0 and not args.purged then return cjson.encode({keys = keys}) end
free_results(id)
drop_dead(id)
redis.call('ZREM', prefix .. ':jobs:' .. (get(id, 'owner') or ''), id)
redis.call('UNLINK', prefix .. ':events:' .. id, prefix .. ':preview:' .. id)
redis.call('HDEL', job_key(id), 'job', 'owner', 'stages', 'results', 'warnings', 'error', 'webhook', 'input_key')
return '{}'
