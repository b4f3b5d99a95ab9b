"""The scripts that `giantleap.service.jobqueue.producer` runs: a job comes in, is read, is canceled, is overdue. See
`giantleap.service.jobqueue.scripts`."""

# KEYS[2], if the caller gave an idempotency key: its name. ARGV: limits, job id, bundle, priority, job JSON, payload
# digest, owner or '', the owner's most live jobs or -1, name of the uploaded input (`giantleap.service.jobqueue.blobs`)
# or '', JSON of what else there is: latent_px, cancel_after_s, webhook (JSON in JSON), input_bytes, finish where
# nothing is drawn: such a job waits in the finish queue once a worker has made one.
# Replies {verdict, job id, queue position, seconds until the start or ''}; verdicts: created, existing, mismatch, full,
# full_px, busy, storage; upload: it may come in, but its input is not there.
ENQUEUE = """
local id, bundle, priority, job, digest, upload = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[9]
local owner, max_live = ARGV[7], tonumber(ARGV[8])
local caller_key, extra = KEYS[2], cjson.decode(ARGV[10] or '{}')
local latent_px, cancel_after_s, input_bytes = extra.latent_px or 0, extra.cancel_after_s, extra.input_bytes or 0

-- Nothing comes in: neither does the input that was sent along.
local function refuse(verdict, known_id, number)
  if upload ~= '' then redis.call('UNLINK', upload) end
  return {verdict, known_id, number, ''}
end
local function existing(known_id, known_digest)
  if known_digest ~= digest then return refuse('mismatch', known_id, -1) end
  return refuse('existing', known_id, redis.call('EXISTS', job_key(known_id)) == 1 and position(known_id) or -1)
end

if caller_key then
  local known = redis.call('HMGET', caller_key, 'job', 'digest')
  if known[1] then return existing(known[1], known[2]) end
end
if redis.call('EXISTS', job_key(id)) == 1 then return existing(id, get(id, 'digest')) end

local depth = redis.call('ZCARD', P .. ':delayed')
for _, lane in ipairs(redis.call('SMEMBERS', P .. ':lanes')) do
  depth = depth + redis.call('XLEN', P .. ':stream:' .. lane)
end
if depth >= C.queue_limit then return refuse('full', id, depth) end
local queued_px = tonumber(redis.call('GET', P .. ':queued_px') or 0)
local over_px = C.queue_limit_latent_px > 0 and queued_px + latent_px > C.queue_limit_latent_px
if over_px and queued_px > 0 then return refuse('full_px', id, queued_px) end
local live = P .. ':live:' .. owner
if max_live >= 0 and redis.call('SCARD', live) >= max_live then
  -- Every end of a job takes it out of the set; one whose record went in another way must not count for ever.
  for _, known in ipairs(redis.call('SMEMBERS', live)) do
    local state = get(known, 'state')
    if not state or is_final(state) then redis.call('SREM', live, known) end
  end
  if redis.call('SCARD', live) >= max_live then return refuse('busy', id, redis.call('SCARD', live)) end
end
if input_bytes > 0 then
  if upload == '' or redis.call('STRLEN', upload) ~= input_bytes then return refuse('upload', id, -1) end
  if not make_room(input_bytes) then return refuse('storage', id, blob_bytes()) end
  redis.call('RENAME', upload, P .. ':input:' .. id)
  redis.call('PERSIST', P .. ':input:' .. id)
  count_bytes(input_bytes)
end
redis.call('HSET', job_key(id), 'job', job, 'bundle', bundle, 'priority', priority, 'digest', digest,
  'deliveries', 0, 'input_bytes', input_bytes)
if extra.finish and redis.call('EXISTS', P .. ':stream:' .. bundle .. '+finish:' .. priority) == 1 then
  redis.call('HSET', job_key(id), 'part', '+finish')
end
if owner ~= '' then
  redis.call('HSET', job_key(id), 'owner', owner)
  redis.call('SADD', live, id)
end
if extra.webhook then redis.call('HSET', job_key(id), 'webhook', extra.webhook) end
if latent_px > 0 then
  redis.call('HSET', job_key(id), 'latent_px', latent_px)
  redis.call('INCRBY', P .. ':queued_px', latent_px)
end
if cancel_after_s then
  local deadline_ms = string.format('%.0f', now_ms + 1000 * cancel_after_s)
  redis.call('HSET', job_key(id), 'deadline_ms', deadline_ms, 'cancel_after', tostring(cancel_after_s))
  redis.call('ZADD', P .. ':deadlines', deadline_ms, id)
end
-- Scores rise strictly, so that one of them is a place in the list.
local list = P .. ':jobs:' .. owner
local newest = redis.call('ZREVRANGE', list, 0, 0, 'WITHSCORES')
redis.call('ZADD', list, string.format('%.0f', math.max(now_us, tonumber(newest[2] or 0) + 1)), id)
redis.call('ZREMRANGEBYRANK', list, 0, -C.list_limit - 1)
redis.call('PEXPIRE', list, C.list_ttl_ms)
if caller_key then
  redis.call('HSET', caller_key, 'job', id, 'digest', digest)
  redis.call('PEXPIRE', caller_key, C.idempotency_ttl_ms)
end
local rank = push(id)
return {'created', id, rank, start_s(id, rank)}
"""

# ARGV: limits, owner, requests a minute. Replies 0 and pays for one request, or the us until one may come. The generic
# cell rate algorithm (ITU-T I.371, virtual scheduling): a whole minute's requests may come at once, and then one at
# each interval.
SPEND = """
local key, interval_us = P .. ':rate:' .. ARGV[2], 60000000 / tonumber(ARGV[3])
local paid_us = math.max(tonumber(redis.call('GET', key) or 0), now_us) + interval_us
local wait_us = paid_us - now_us - 60000000
if wait_us >= 1 then return math.ceil(wait_us) end
redis.call('SET', key, string.format('%.0f', paid_us), 'PX', math.ceil((paid_us - now_us) / 1000))
return 0
"""

# ARGV: limits, job id. Replies {fields and values of the record, queue position} or nil. Besides the fields of the job
# hash there may be start_s, seconds until it starts or '', and left_ms, the time to its deadline. Writes nothing.
READ = """
return record(ARGV[2])
"""

# ARGV: limits, job id or ''. Ends the jobs whose deadline has passed, that one first.
END_OVERDUE = """
local id = ARGV[2]
local state = get(id, 'state')
if state and not is_final(state) and overdue(id) then close_overdue(id, '{}') end
end_overdue()
"""

# ARGV: limits, job id. Replies as READ. A queued job's message stays: deleting what was never delivered would
# make the group's lag unknown; the worker that meets it drops it.
CANCEL = """
local id = ARGV[2]
local state = get(id, 'state')
if not state then return false end
if not is_final(state) then
  redis.call('HSET', job_key(id), 'cancel', 1)
  if state == 'queued' then close_job(id, 'canceled', '{}') end
end
return record(id)
"""

# ARGV: limits. Replies {lane and number queued, ..}, processing, delayed, dead-lettered, oldest (us), workers,
# durations, blob bytes, {queue, median s or '', ..}, workers that only draw, that only finish.
STATS = """
free_expired()
local queued, medians, oldest_us = {}, {}, now_us
for _, lane in ipairs(redis.call('SMEMBERS', P .. ':lanes')) do
  local key = P .. ':queued:' .. lane
  queued[#queued + 1] = lane
  queued[#queued + 1] = redis.call('ZCARD', key)
  local queue = string.match(lane, '^(.*):')
  medians[#medians + 1] = queue
  medians[#medians + 1] = tostring(median_duration_s(queue) or '')
  local first = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
  if first[2] then oldest_us = math.min(oldest_us, tonumber(first[2])) end
end
return {queued, redis.call('SCARD', P .. ':running'), redis.call('ZCARD', P .. ':delayed'),
  redis.call('XLEN', P .. ':dead'), now_us - oldest_us,
  live_workers(), redis.call('LRANGE', P .. ':durations', 0, -1), blob_bytes(), medians,
  live_workers('generate'), live_workers('decode')}
"""

# ARGV: limits. Replies the device JSON of each live worker.
DEVICES = """
local devices = {}
for _, consumer in ipairs(redis.call('ZRANGEBYSCORE', P .. ':workers', now_ms - C.visibility_ms, '+inf')) do
  local device = redis.call('HGET', P .. ':devices', consumer)
  if device then devices[#devices + 1] = device end
end
return devices
"""
