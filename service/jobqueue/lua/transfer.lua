-- Moves a job to the finish queue of its bundle: the latents replace the input, the earlier starts no longer count and
-- the job waits again. A job whose cancellation was requested is canceled instead.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- ARGV[2]  the claim (see claim_fence), stages and warnings (JSON texts), batch_jobs and idle_s, optionally input_key
--          (of latents in the result store)
-- ARGV[3]  the latents, '' if the input is a latent or they are in the store
-- Reply    status: done, lost, no_room, canceled
-- @include settle_canceled
-- @include make_room
-- @include add_duration
-- @include push

local id, stages, latents = args.id, args.stages, ARGV[3]
local held_bytes = get_number(id, 'input_bytes')
if not owns_claim() then return reply_not_owned() end
if end_if_overdue(stages) then return reply('lost') end
local canceled = settle_canceled(stages)
if canceled then return canceled end
if args.input_key then
  redis.call('UNLINK', prefix .. ':input:' .. id)
  add_blob_bytes(-held_bytes)
  redis.call('HSET', job_key(id), 'input_bytes', 0, 'input_key', args.input_key)
elseif latents ~= '' then
  if not make_room(#latents - held_bytes) then return reply('no_room') end
  redis.call('SET', prefix .. ':input:' .. id, latents)
  add_blob_bytes(#latents - held_bytes)
  redis.call('HSET', job_key(id), 'input_bytes', #latents)
  redis.call('HDEL', job_key(id), 'input_key')
end
if args.input_key or latents ~= '' then
  redis.call('HSET', job_key(id), 'stages', stages, 'warnings', args.warnings)
  add_duration(prefix .. ':durations:' .. queue_of(id), 31)
end
redis.call('HSET', job_key(id), 'part', '+finish', 'deliveries', 0)
redis.call('HDEL', job_key(id), 'error')
redis.call('SREM', prefix .. ':running', id)
local settled = settle('done')
push(id)
return settled
