-- Requests that a job stops; a queued one is canceled at once.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- ARGV[2]  id
-- Reply    the record (`StoredJob`), or nothing if the job is unknown
-- @include arguments
-- @include request_cancel

if not get(args.id, 'state') then return nil end
request_cancel(args.id)
local record = read_record(args.id)
return record and cjson.encode(record)
