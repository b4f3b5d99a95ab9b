-- Ends a job with its results. A job whose cancellation was requested is canceled instead.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- ARGV[2]  the claim (see claim_fence), results, stages and warnings (JSON texts), batch_jobs and idle_s, upload (name
--          of the uploaded results, '' for none), files and bytes of the upload
-- Reply    status: done, lost, canceled, no_room, or no_upload (the results have not arrived)
-- @include settle_canceled
-- @include make_room
-- @include add_duration

local id, upload, uploaded = args.id, prefix .. ':upload:' .. args.upload, args.upload ~= ''

local function refuse(reason)
  if uploaded then redis.call('UNLINK', upload) end
  return reason
end

if not owns_claim() then return refuse(reply_not_owned()) end
if end_if_overdue(args.stages) then return refuse(reply('lost')) end
local canceled = settle_canceled(args.stages)
if canceled then return refuse(canceled) end
-- The upload has one field more than there are files: the empty one with which it began.
if uploaded and redis.call('HLEN', upload) ~= args.files + 1 then return refuse(reply('no_upload')) end
if not make_room(args.bytes - get_number(id, 'input_bytes')) then return refuse(reply('no_room')) end
if uploaded then
  redis.call('HDEL', upload, '')
  redis.call('RENAME', upload, prefix .. ':result:' .. id)
  redis.call('PEXPIRE', prefix .. ':result:' .. id, config.ttl_ms)
  record_blob(id, args.bytes)
  add_blob_bytes(args.bytes)
end
redis.call('HSET', job_key(id), 'results', args.results, 'warnings', args.warnings)
redis.call('HDEL', job_key(id), 'error')
add_duration(prefix .. ':durations', 100)
add_duration(prefix .. ':durations:' .. queue_of(id), 31)
close_job(id, 'succeeded', args.stages)
return settle('done')
