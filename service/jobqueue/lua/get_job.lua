-- Reads the record of a job. Writes nothing.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- ARGV[2]  id
-- Reply    the record (`StoredJob`), or nothing if the job is unknown
-- @include arguments
-- @include read_record

local record = read_record(args.id)
return record and cjson.encode(record)
