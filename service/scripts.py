"""The Lua scripts of the queue: every change of a job's state is one of these, so it happens whole or not at all.

Each script is `PRELUDE` plus its own text. KEYS[1] is the hash tag (`service.keys`), from which all other names are
built: they share one slot. ARGV[1] is `limits(settings)`. Time is the Redis server's, so hosts need no common clock.
`service.broker` calls ENQUEUE, SPEND, READ, CANCEL, END_OVERDUE and STATS, `service.claims` the others. Those of the
lists of jobs and of webhooks stand in `service.job_list` and `service.webhooks`.
"""

import json

from service.settings import Settings

_RETRY_DELAY_CAP_S = 300.0
# A list of jobs outlives the jobs that end while nothing new comes, within reason.
_LIST_ENTRIES = 1000
_LIST_TTL_S = 86_400
# Deliveries that wait while their receivers are away; what comes on top is dropped into the dead list.
_WEBHOOK_LIMIT = 10_000
_WEBHOOK_TTL_S = 86_400


def limits(settings: Settings) -> str:
    """The settings that the scripts need, as the JSON of their ARGV[1]."""
    return json.dumps(
        {
            "queue_limit": settings.queue_limit,
            "queue_limit_latent_px": settings.queue_limit_latent_px or 0,
            "ttl_ms": settings.job_ttl_s * 1000,
            "idempotency_ttl_ms": settings.idempotency_ttl_s * 1000,
            "budget_bytes": settings.blob_budget_bytes,
            "event_limit": settings.event_limit,
            "visibility_ms": int(settings.visibility_timeout_s * 1000),
            "max_deliveries": settings.max_deliveries,
            "backoff_ms": int(settings.retry_backoff_s * 1000),
            "backoff_cap_ms": int(_RETRY_DELAY_CAP_S * 1000),
            "list_limit": max(_LIST_ENTRIES, settings.queue_limit),
            "list_ttl_ms": (_LIST_TTL_S + settings.job_ttl_s) * 1000,
            "webhook_limit": _WEBHOOK_LIMIT,
            "webhook_ttl_ms": _WEBHOOK_TTL_S * 1000,
        }
    )


PRELUDE = """
local P, C, GROUP = KEYS[1], cjson.decode(ARGV[1]), 'workers'
local clock = redis.call('TIME')
local now_us = clock[1] * 1000000 + clock[2]
local now_ms = math.floor(now_us / 1000)
local now_s = string.format('%.6f', now_us / 1000000)

local function job_key(id) return P .. ':job:' .. id end
local function get(id, field) return redis.call('HGET', job_key(id), field) end
local function get_number(id, field) return tonumber(get(id, field) or 0) end
local function is_final(state) return state == 'succeeded' or state == 'failed' or state == 'canceled' end
local function lane_of(id) return get(id, 'bundle') .. ':' .. get(id, 'priority') end

local function ensure_group(lane)
  local stream = P .. ':stream:' .. lane
  if redis.call('EXISTS', stream) == 0 then
    redis.call('XGROUP', 'CREATE', stream, GROUP, '0', 'MKSTREAM')
  end
  redis.call('SADD', P .. ':lanes', lane)
end

local function emit(id, name, data)
  redis.call('XADD', P .. ':events:' .. id, 'MAXLEN', C.event_limit, '*', 'name', name, 'data', data)
end

-- Jobs that a worker would take before this one; -1 where it does not wait in a stream.
local function position(id)
  local rank = redis.call('ZRANK', P .. ':queued:' .. lane_of(id), id)
  if not rank then return -1 end
  if get(id, 'priority') == 'low' then
    rank = rank + redis.call('ZCARD', P .. ':queued:' .. get(id, 'bundle') .. ':high')
  end
  return rank
end

-- Seconds that a job of the bundle usually takes, else one of any bundle; nil before the first has ended.
local function usual_s(bundle)
  local recent = redis.call('LRANGE', P .. ':durations:' .. bundle, 0, -1)
  if #recent == 0 then recent = redis.call('LRANGE', P .. ':durations', 0, 30) end
  for i, text in ipairs(recent) do recent[i] = tonumber(text) end
  table.sort(recent)
  return recent[math.ceil(#recent / 2)]
end

local function live_workers() return redis.call('ZCOUNT', P .. ':workers', now_ms - C.visibility_ms, '+inf') end

-- Seconds as text until a job at this position starts: the jobs that must end first x median / live workers.
local function start_s(id, rank)
  local workers, each_s = live_workers(), usual_s(get(id, 'bundle'))
  if rank < 0 or workers == 0 or not each_s then return '' end
  local first = math.max(0, rank + redis.call('SCARD', P .. ':running') + 1 - workers)
  return string.format('%.3f', first * each_s / workers)
end

local function overdue(id)
  local deadline_ms = get(id, 'deadline_ms')
  return deadline_ms and tonumber(deadline_ms) <= now_ms
end

-- Fields and values of the record, with what depends on the moment; false where there is none.
local function record(id)
  local fields = redis.call('HGETALL', job_key(id))
  if #fields == 0 then return false end
  local rank, deadline_ms = position(id), get(id, 'deadline_ms')
  if rank >= 0 then
    fields[#fields + 1] = 'start_s'
    fields[#fields + 1] = start_s(id, rank)
  end
  if deadline_ms then
    fields[#fields + 1] = 'left_ms'
    fields[#fields + 1] = string.format('%.0f', tonumber(deadline_ms) - now_ms)
  end
  return {fields, rank}
end

local function push(id)
  local lane = lane_of(id)
  ensure_group(lane)
  redis.call('XADD', P .. ':stream:' .. lane, '*', 'job', id)
  redis.call('HSET', job_key(id), 'state', 'queued', 'queued_us', string.format('%.0f', now_us))
  redis.call('ZADD', P .. ':queued:' .. lane, now_us, id)
  emit(id, 'queued', string.format('{"position":%d}', position(id)))
end

-- XACK and XDEL together: the stream's length stays the number of jobs queued and running.
local function drop_message(lane, message)
  redis.call('XACK', P .. ':stream:' .. lane, GROUP, message)
  redis.call('XDEL', P .. ':stream:' .. lane, message)
end

local function count_bytes(change) redis.call('INCRBY', P .. ':blob_bytes', string.format('%.0f', change)) end
local function blob_bytes() return tonumber(redis.call('GET', P .. ':blob_bytes') or 0) end
local function result_bytes(id) return tonumber(redis.call('HGET', P .. ':blob_sizes', id) or 0) end

local function free_results(id)
  count_bytes(-result_bytes(id))
  redis.call('HDEL', P .. ':blob_sizes', id)
  redis.call('ZREM', P .. ':blob_results', id)
  redis.call('UNLINK', P .. ':result:' .. id)
end

local function free_expired()
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', P .. ':blob_results', '-inf', now_ms)) do free_results(id) end
end

-- Makes room for so many bytes more by evicting the oldest results; evicts nothing where that cannot be enough.
local function make_room(bytes)
  free_expired()
  if bytes <= 0 then return true end
  local over = blob_bytes() + bytes - C.budget_bytes
  local victims = {}
  if over > 0 then
    for _, id in ipairs(redis.call('ZRANGE', P .. ':blob_results', 0, -1)) do
      if over <= 0 then break end
      over = over - result_bytes(id)
      victims[#victims + 1] = id
    end
  end
  if over > 0 then return false end
  for _, id in ipairs(victims) do free_results(id) end
  return true
end

-- The delivery of a webhook is written by the script that ends the job, so that none is lost.
local function tell(id, state, webhook)
  local asked, wanted = cjson.decode(webhook), false
  for _, event in ipairs(asked.events) do wanted = wanted or event == state end
  if not wanted then return end
  if redis.call('ZCARD', P .. ':webhooks') >= C.webhook_limit then
    redis.call('XADD', P .. ':webhooks_dead', 'MAXLEN', '~', 1000, '*', 'job', id, 'reason', 'too many wait')
    return
  end
  local delivery = string.format('%s-%.0f', id, now_ms)
  redis.call('HSET', P .. ':webhook:' .. delivery, 'url', asked.url, 'job', id, 'state', state, 'attempts', 0,
    'bundle', get(id, 'bundle'), 'finished_at_s', now_s, 'error', get(id, 'error') or '')
  redis.call('PEXPIRE', P .. ':webhook:' .. delivery, C.webhook_ttl_ms)
  redis.call('ZADD', P .. ':webhooks', now_ms, delivery)
end

local function close_job(id, state, stages)
  local job, lane = job_key(id), lane_of(id)
  local latent_px, deadline_ms, webhook = unpack(redis.call('HMGET', job, 'latent_px', 'deadline_ms', 'webhook'))
  local input_bytes = get_number(id, 'input_bytes')
  if input_bytes > 0 then
    redis.call('UNLINK', P .. ':input:' .. id)
    count_bytes(-input_bytes)
  end
  redis.call('ZREM', P .. ':queued:' .. lane, id)
  redis.call('ZREM', P .. ':delayed', id)
  redis.call('SREM', P .. ':running', id)
  redis.call('SREM', P .. ':live:' .. (get(id, 'owner') or ''), id)
  if latent_px then redis.call('DECRBY', P .. ':queued_px', latent_px) end
  if deadline_ms then redis.call('ZREM', P .. ':deadlines', id) end
  if webhook then tell(id, state, webhook) end
  redis.call('HSET', job, 'state', state, 'finished_at_s', now_s, 'stages', stages, 'input_bytes', 0)
  emit(id, 'done', '{"state":"' .. state .. '"}')
  redis.call('PEXPIRE', job, C.ttl_ms)
  redis.call('PEXPIRE', P .. ':events:' .. id, C.ttl_ms)
  redis.call('PUBLISH', P .. ':done', id)
end

local function close_overdue(id, stages)
  local detail = 'The job did not end within the ' .. get(id, 'cancel_after') .. ' s of its Cancel-After.'
  redis.call('HSET', job_key(id), 'error', cjson.encode({code = 'deadline_passed', detail = detail, retryable = false}))
  close_job(id, 'failed', stages)
end

-- A deadline ends a job wherever it is; a worker that has it finds out at its next step.
local function end_overdue()
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', P .. ':deadlines', '-inf', now_ms, 'LIMIT', 0, 100)) do
    local state = get(id, 'state')
    if state and not is_final(state) then close_overdue(id, '{}') end
    redis.call('ZREM', P .. ':deadlines', id)  -- also one whose record somebody deleted: it must not stop every claim
  end
end

local function beat(consumer, device)
  redis.call('ZREMRANGEBYSCORE', P .. ':workers', '-inf', now_ms - 10 * C.visibility_ms)
  redis.call('ZADD', P .. ':workers', now_ms, consumer)
  redis.call('PEXPIRE', P .. ':workers', 10 * C.visibility_ms)
  if device ~= '' then redis.call('HSET', P .. ':devices', consumer, device) end
  for _, known in ipairs(redis.call('HKEYS', P .. ':devices')) do
    if not redis.call('ZSCORE', P .. ':workers', known) then redis.call('HDEL', P .. ':devices', known) end
  end
  redis.call('PEXPIRE', P .. ':devices', 10 * C.visibility_ms)
end

local function close_failed(id, error, stages)
  redis.call('HSET', job_key(id), 'error', error)
  close_job(id, 'failed', stages)
  redis.call('XADD', P .. ':dead', 'MAXLEN', '~', 1000, '*', 'job', id, 'lane', lane_of(id),
    'deliveries', get_number(id, 'deliveries'), 'error', error)
end
"""

# What `service.claims` sends to name one claim, and the fence that stands before every write of a worker.
_OWNER = """
local consumer, lane, message, id, delivery = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local stream, token = P .. ':stream:' .. lane, consumer .. ' ' .. message .. ' ' .. delivery

local function owns()
  local pending = redis.call('XPENDING', stream, GROUP, message, message, 1)
  return #pending == 1 and pending[1][2] == consumer and get(id, 'deliveries') == delivery
end

-- A worker that lost the reply sends again: it is told what its first call did.
local function settled_before() return get(id, 'settled') == token and 1 or 0 end
local function settle()
  redis.call('HSET', job_key(id), 'settled', token)
  drop_message(lane, message)
end

-- Whether a deadline has ended the job: then nothing of the claim counts any more.
local function past(stages)
  local final = is_final(get(id, 'state'))
  if not final and not overdue(id) then return false end
  if not final then close_overdue(id, stages) end
  drop_message(lane, message)
  return true
end
"""

# KEYS[2], if the caller gave an idempotency key: its name. ARGV: limits, job id, bundle, priority, job JSON, payload
# digest, owner or '', the owner's most live jobs or -1, body or '', JSON of what else there is: latent_px,
# cancel_after_s, webhook (JSON in JSON).
# Replies {verdict, job id, queue position, seconds until the start or ''}; verdicts: created, existing, mismatch, full,
# full_px, busy, storage.
ENQUEUE = """
local id, bundle, priority, job, digest, body = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[9]
local owner, most_live = ARGV[7], tonumber(ARGV[8])
local caller_key, extra = KEYS[2], cjson.decode(ARGV[10] or '{}')
local latent_px, cancel_after_s = extra.latent_px or 0, extra.cancel_after_s
if body == '' then body = nil end
local function existing(known_id, known_digest)
  if known_digest ~= digest then return {'mismatch', known_id, -1, ''} end
  return {'existing', known_id, redis.call('EXISTS', job_key(known_id)) == 1 and position(known_id) or -1, ''}
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
if depth >= C.queue_limit then return {'full', id, depth, ''} end
local queued_px = tonumber(redis.call('GET', P .. ':queued_px') or 0)
local over_px = C.queue_limit_latent_px > 0 and queued_px + latent_px > C.queue_limit_latent_px
if over_px and queued_px > 0 then return {'full_px', id, queued_px, ''} end
local live = P .. ':live:' .. owner
if most_live >= 0 and redis.call('SCARD', live) >= most_live then
  -- Every end of a job takes it out of the set; one whose record went in another way must not count for ever.
  for _, known in ipairs(redis.call('SMEMBERS', live)) do
    local state = get(known, 'state')
    if not state or is_final(state) then redis.call('SREM', live, known) end
  end
  if redis.call('SCARD', live) >= most_live then return {'busy', id, redis.call('SCARD', live), ''} end
end
if body then
  if not make_room(#body) then return {'storage', id, blob_bytes(), ''} end
  redis.call('SET', P .. ':input:' .. id, body)
  count_bytes(#body)
end
redis.call('HSET', job_key(id), 'job', job, 'bundle', bundle, 'priority', priority, 'digest', digest,
  'deliveries', 0, 'input_bytes', body and #body or 0)
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
push(id)
local rank = position(id)
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

# ARGV: limits, job id. Replies {fields and values of the job hash, queue position} or nil.
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
# durations, blob bytes, {bundle with jobs, median s or '', ..}.
STATS = """
free_expired()
local queued, medians, oldest_us = {}, {}, now_us
for _, lane in ipairs(redis.call('SMEMBERS', P .. ':lanes')) do
  local key = P .. ':queued:' .. lane
  queued[#queued + 1] = lane
  queued[#queued + 1] = redis.call('ZCARD', key)
  local bundle = string.match(lane, '^(.*):')
  medians[#medians + 1] = bundle
  medians[#medians + 1] = tostring(usual_s(bundle) or '')
  local first = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
  if first[2] then oldest_us = math.min(oldest_us, tonumber(first[2])) end
end
return {queued, redis.call('SCARD', P .. ':running'), redis.call('ZCARD', P .. ':delayed'),
  redis.call('XLEN', P .. ':dead'), now_us - oldest_us,
  live_workers(), redis.call('LRANGE', P .. ':durations', 0, -1), blob_bytes(), medians}
"""

# ARGV: limits, consumer, device JSON or '', lanes ... Makes the groups and forgets consumers of dead workers that hold
# nothing.
OPEN = """
for i = 4, #ARGV do
  ensure_group(ARGV[i])
  local stream = P .. ':stream:' .. ARGV[i]
  for _, info in ipairs(redis.call('XINFO', 'CONSUMERS', stream, GROUP)) do
    local consumer = {}
    for j = 1, #info, 2 do consumer[info[j]] = info[j + 1] end
    if consumer.pending == 0 and consumer.idle > 3600000 then
      redis.call('XGROUP', 'DELCONSUMER', stream, GROUP, consumer.name)
    end
  end
end
beat(ARGV[2], ARGV[3])
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

# ARGV: limits, consumer, lanes ... A consumer that still holds messages is kept: deleting it would lose them.
CLOSE = """
redis.call('ZREM', P .. ':workers', ARGV[2])
redis.call('HDEL', P .. ':devices', ARGV[2])
for i = 3, #ARGV do
  local stream = P .. ':stream:' .. ARGV[i]
  if #redis.call('XPENDING', stream, GROUP, '-', '+', 1, ARGV[2]) == 0 then
    redis.call('XGROUP', 'DELCONSUMER', stream, GROUP, ARGV[2])
  end
end
"""

# ARGV: limits, consumer, most jobs, JSON list of '<lane> <message>' that this consumer works on, lanes in the order
# in which to take. Replies {claims, last id of each lane's stream, ms until the next retry is due or -1}.
CLAIM = """
local consumer, left, held = ARGV[2], tonumber(ARGV[3]), {}
for _, name in ipairs(cjson.decode(ARGV[4])) do held[name] = true end
local taken = {}

local function begin(lane, message, id)
  local state, deliveries = get(id, 'state'), get_number(id, 'deliveries')
  if not state or is_final(state) then return drop_message(lane, message) end
  if get(id, 'cancel') then
    close_job(id, 'canceled', '{}')
    return drop_message(lane, message)
  end
  if overdue(id) then
    close_overdue(id, '{}')
    return drop_message(lane, message)
  end
  if deliveries >= C.max_deliveries then
    local detail = 'It was started ' .. deliveries .. ' times and each time its worker was lost; it is not tried again.'
    close_failed(id, get(id, 'error') or cjson.encode({code = 'job_failed', detail = detail, retryable = false}), '{}')
    return drop_message(lane, message)
  end
  deliveries = deliveries + 1
  redis.call('ZREM', P .. ':queued:' .. lane, id)
  redis.call('SADD', P .. ':running', id)
  redis.call('HSET', job_key(id), 'state', 'processing', 'deliveries', deliveries, 'started_at_s', now_s)
  emit(id, 'started', string.format('{"delivery":%d}', deliveries))
  taken[#taken + 1] = {get(id, 'job'), lane, message, deliveries, get_number(id, 'input_bytes')}
  left = left - 1
end

end_overdue()
for _, id in ipairs(redis.call('ZRANGEBYSCORE', P .. ':delayed', '-inf', now_ms, 'LIMIT', 0, 100)) do
  redis.call('ZREM', P .. ':delayed', id)
  push(id)
end

for i = 5, #ARGV do
  local lane = ARGV[i]
  ensure_group(lane)
  local stale = redis.call('XPENDING', P .. ':stream:' .. lane, GROUP, 'IDLE', C.visibility_ms, '-', '+', 1000)
  for _, entry in ipairs(stale) do
    if left > 0 and not (entry[2] == consumer and held[lane .. ' ' .. entry[1]]) then
      local claimed = redis.call('XCLAIM', P .. ':stream:' .. lane, GROUP, consumer, 0, entry[1])
      if claimed[1] then begin(lane, entry[1], claimed[1][2][2]) end
    end
  end
end

for i = 5, #ARGV do
  local lane, read = ARGV[i], true
  while left > 0 and read do
    read = redis.call('XREADGROUP', 'GROUP', GROUP, consumer, 'COUNT', left, 'STREAMS', P .. ':stream:' .. lane, '>')
    if read then
      for _, entry in ipairs(read[1][2]) do begin(lane, entry[1], entry[2][2]) end
    end
  end
end

local last_ids, wait_ms = {}, -1
if #taken == 0 then
  for i = 5, #ARGV do
    local info = redis.call('XINFO', 'STREAM', P .. ':stream:' .. ARGV[i])
    for j = 1, #info, 2 do
      if info[j] == 'last-generated-id' then last_ids[#last_ids + 1] = info[j + 1] end
    end
  end
  local due = redis.call('ZRANGE', P .. ':delayed', 0, 0, 'WITHSCORES')
  if due[2] then wait_ms = math.max(0, tonumber(due[2]) - now_ms) end
end
return {taken, last_ids, wait_ms}
"""

# ARGV: limits, job ids ... Replies those that shall not be worked on: canceled, or past their deadline.
STOPPED = """
local stopped = {}
for i = 2, #ARGV do
  local id = ARGV[i]
  if get(id, 'cancel') or overdue(id) then stopped[#stopped + 1] = id end
end
return stopped
"""

# ARGV: limits, consumer, device as for OPEN, then lane, message, job id, delivery of each claim held. Replies the ids
# of the jobs lost. The owner is checked before XCLAIM: an unconditional one would take a message back from its new
# owner.
RENEW = """
beat(ARGV[2], ARGV[3])
local lost = {}
for i = 4, #ARGV, 4 do
  local stream, message, id = P .. ':stream:' .. ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local pending = redis.call('XPENDING', stream, GROUP, message, message, 1)
  if #pending == 1 and pending[1][2] == ARGV[2] and get(id, 'deliveries') == ARGV[i + 3] then
    redis.call('XCLAIM', stream, GROUP, ARGV[2], 0, message, 'JUSTID')
  else
    lost[#lost + 1] = id
  end
end
return lost
"""

# ARGV: limits, the claim, event name, data JSON. Replies 1, or 0 where the claim is lost.
EMIT = (
    _OWNER
    + """
if not owns() or is_final(get(id, 'state')) then return 0 end
emit(id, ARGV[7], ARGV[8])
return 1
"""
)

# ARGV: limits, the claim, results JSON, stages JSON, warnings JSON, blobs ... Replies 1, 0 lost, -1 no room.
FINISH = (
    _OWNER
    + """
if not owns() then return settled_before() end
if past(ARGV[8]) then return 0 end
local bytes, fields = 0, {}
for i = 10, #ARGV do
  bytes = bytes + #ARGV[i]
  fields[#fields + 1] = i - 10
  fields[#fields + 1] = ARGV[i]
end
if not make_room(bytes - get_number(id, 'input_bytes')) then return -1 end
if bytes > 0 then
  redis.call('HSET', P .. ':result:' .. id, unpack(fields))
  redis.call('PEXPIRE', P .. ':result:' .. id, C.ttl_ms)
  redis.call('ZADD', P .. ':blob_results', string.format('%.3f', now_us / 1000 + C.ttl_ms), id)
  redis.call('HSET', P .. ':blob_sizes', id, bytes)
  count_bytes(bytes)
end
redis.call('HSET', job_key(id), 'results', ARGV[7], 'warnings', ARGV[9])
redis.call('HDEL', job_key(id), 'error')
local took_s = string.format('%.6f', now_us / 1000000 - get_number(id, 'started_at_s'))
for list, most in pairs({[P .. ':durations'] = 99, [P .. ':durations:' .. get(id, 'bundle')] = 30}) do
  redis.call('LPUSH', list, took_s)
  redis.call('LTRIM', list, 0, most)
end
close_job(id, 'succeeded', ARGV[8])
settle()
return 1
"""
)

# ARGV: limits, the claim, error JSON, '1' if retryable, stages JSON. Replies 1, or 0 where the claim is lost.
FAIL = (
    _OWNER
    + """
if not owns() then return settled_before() end
local error, retryable, stages, starts = ARGV[7], ARGV[8] == '1', ARGV[9], tonumber(delivery)
if past(stages) then return 0 end
if get(id, 'cancel') then
  close_job(id, 'canceled', stages)
elseif retryable and starts < C.max_deliveries then
  local delay_ms = math.min(C.backoff_ms * 2 ^ (starts - 1), C.backoff_cap_ms)
  redis.call('SREM', P .. ':running', id)
  redis.call('HSET', job_key(id), 'state', 'queued', 'error', error)
  redis.call('ZADD', P .. ':delayed', now_ms + delay_ms, id)
  emit(id, 'retrying', string.format('{"delivery":%d,"delay_s":%.3f}', starts, delay_ms / 1000))
else
  close_failed(id, error, stages)
end
settle()
return 1
"""
)

# ARGV: limits, the claim, stages JSON. Replies 1, or 0 where the claim is lost.
FINISH_CANCELED = (
    _OWNER
    + """
if not owns() then return settled_before() end
if past(ARGV[7]) then return 1 end
close_job(id, 'canceled', ARGV[7])
settle()
return 1
"""
)

# ARGV: limits, the claim. The message goes to a consumer that no worker is, so old that it is stale at once: the next
# worker takes it before anything else. The delivery is not counted.
RELEASE = (
    _OWNER
    + """
if not owns() then return 0 end
if past('{}') then return 1 end
if get(id, 'cancel') then
  close_job(id, 'canceled', '{}')
  settle()
  return 1
end
redis.call('XCLAIM', stream, GROUP, 'released', 0, message, 'IDLE', 86400000 + C.visibility_ms, 'JUSTID')
redis.call('SREM', P .. ':running', id)
redis.call('HINCRBY', job_key(id), 'deliveries', -1)
redis.call('HSET', job_key(id), 'state', 'queued')
redis.call('ZADD', P .. ':queued:' .. lane, get(id, 'queued_us'), id)
emit(id, 'queued', string.format('{"position":%d}', position(id)))
return 1
"""
)
