-- Adds a job to its queue, or finds the one that is already there under the same idempotency key or id.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- ARGV[2]  id, bundle, priority, owner ('' for none), digest of the payload, latent_px, input_bytes, upload (name of
--          the uploaded input, '' for none), finish (nothing is generated: the job goes to the finish queue if a
--          worker has created it), and optionally idempotency (digest of the key), max_live (live jobs of the owner),
--          cost_us (of the job's work, in time of the owner's budget), cancel_after_s, webhook (JSON text),
--          input_key (of an input in the result store; input_bytes is 0 then)
-- ARGV[3]  the job as JSON, stored as it is
-- Reply    status: created, existing, mismatch, full, full_px, busy, work, storage, or upload (the input has not
--          arrived); job_id; created_at_s; queue_position; estimated_start_s; jobs (in the queue, with a created one);
--          for a refusal amount (what is in use) or wait_us
-- @include arguments
-- @include config
-- @include free_expired
-- @include get
-- @include is_final
-- @include make_room
-- @include now_s
-- @include pay
-- @include push
-- @include wait_us
-- @include estimate_start_s

local id, owner, upload = args.id, args.owner, prefix .. ':upload:' .. args.upload
local caller_key = args.idempotency and prefix .. ':idempotency:' .. args.idempotency

-- A job that is not added takes the input that was sent along with it.
local function reply_without_job(status, fields)
  if args.upload ~= '' then redis.call('UNLINK', upload) end
  fields.status = status
  fields.job_id = fields.job_id or id
  return cjson.encode(fields)
end

local function reply_known(known_id, digest)
  if digest ~= args.digest then return reply_without_job('mismatch', {job_id = known_id}) end
  local rank = redis.call('EXISTS', job_key(known_id)) == 1 and position(known_id) or nil
  return reply_without_job('existing', {
    job_id = known_id, queue_position = rank, created_at_s = tonumber(get(known_id, 'created_at_s') or nil),
  })
end

if caller_key then
  local known_id, digest = unpack(redis.call('HMGET', caller_key, 'job', 'digest'))
  if known_id then return reply_known(known_id, digest) end
end
if redis.call('EXISTS', job_key(id)) == 1 then return reply_known(id, get(id, 'digest')) end

local depth = redis.call('ZCARD', prefix .. ':delayed')
for _, lane in ipairs(redis.call('SMEMBERS', prefix .. ':lanes')) do
  depth = depth + redis.call('XLEN', prefix .. ':stream:' .. lane)
end
if depth >= config.queue_limit then return reply_without_job('full', {amount = depth}) end

local queued_px = tonumber(redis.call('GET', prefix .. ':queued_px') or 0)
local over_px = config.queue_limit_latent_px > 0 and queued_px + args.latent_px > config.queue_limit_latent_px
if over_px and queued_px > 0 then return reply_without_job('full_px', {amount = queued_px}) end

local live = prefix .. ':live:' .. owner
if args.max_live and redis.call('SCARD', live) >= args.max_live then
  -- Every script that ends a job takes it out of the set. A record that was deleted otherwise must not count for ever.
  for _, known in ipairs(redis.call('SMEMBERS', live)) do
    local state = get(known, 'state')
    if not state or is_final(state) then redis.call('SREM', live, known) end
  end
  local count = redis.call('SCARD', live)
  if count >= args.max_live then return reply_without_job('busy', {amount = count}) end
end

local budget = prefix .. ':work:' .. owner
local left_us = args.cost_us and wait_us(budget, args.cost_us) or 0
if left_us >= 1 then return reply_without_job('work', {wait_us = left_us}) end

if args.input_bytes > 0 then
  local arrived = args.upload ~= '' and redis.call('STRLEN', upload) == args.input_bytes
  if not arrived then return reply_without_job('upload', {}) end
  if not make_room(args.input_bytes) then return reply_without_job('storage', {amount = blob_bytes()}) end
  redis.call('RENAME', upload, prefix .. ':input:' .. id)
  redis.call('PERSIST', prefix .. ':input:' .. id)
  add_blob_bytes(args.input_bytes)
end

redis.call('HSET', job_key(id), 'job', ARGV[3], 'bundle', args.bundle, 'priority', args.priority, 'digest', args.digest,
  'deliveries', 0, 'input_bytes', args.input_bytes, 'created_at_s', now_s)
if args.finish and redis.call('EXISTS', prefix .. ':stream:' .. args.bundle .. '+finish:' .. args.priority) == 1 then
  redis.call('HSET', job_key(id), 'part', '+finish')
end
if owner ~= '' then
  redis.call('HSET', job_key(id), 'owner', owner)
  redis.call('SADD', live, id)
end
if args.cost_us then
  pay(budget, args.cost_us)
  redis.call('HSET', job_key(id), 'cost_us', string.format('%.0f', args.cost_us))
end
if args.webhook then redis.call('HSET', job_key(id), 'webhook', args.webhook) end
if args.input_key then redis.call('HSET', job_key(id), 'input_key', args.input_key) end
if args.latent_px > 0 then
  redis.call('HSET', job_key(id), 'latent_px', args.latent_px)
  redis.call('INCRBY', prefix .. ':queued_px', args.latent_px)
end
if args.cancel_after_s then
  local deadline_ms = string.format('%.0f', now_ms + 1000 * args.cancel_after_s)
  redis.call('HSET', job_key(id), 'deadline_ms', deadline_ms, 'cancel_after', tostring(args.cancel_after_s))
  redis.call('ZADD', prefix .. ':deadlines', deadline_ms, id)
end

-- Scores rise strictly, so that a score is a place in the list.
local list = prefix .. ':jobs:' .. owner
local newest = redis.call('ZREVRANGE', list, 0, 0, 'WITHSCORES')
redis.call('ZADD', list, string.format('%.0f', math.max(now_us, tonumber(newest[2] or 0) + 1)), id)
redis.call('ZREMRANGEBYRANK', list, 0, -config.list_limit - 1)
redis.call('PEXPIRE', list, config.list_ttl_ms)
if caller_key then
  redis.call('HSET', caller_key, 'job', id, 'digest', args.digest)
  redis.call('PEXPIRE', caller_key, config.idempotency_ttl_ms)
end
local rank = push(id)
local start_s = estimate_start_s(id, rank)
return cjson.encode({
  status = 'created', job_id = id, created_at_s = now_s, queue_position = rank, estimated_start_s = start_s,
  jobs = depth + 1,
})
