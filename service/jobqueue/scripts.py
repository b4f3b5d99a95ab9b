"""What the Lua scripts of the queue share. Every change of a job's state is one of them, whole or not at all.

Each script is `PRELUDE` plus its own text: those of `giantleap.service.jobqueue.producer` stand in
`giantleap.service.jobqueue.scripts_producer`, those of `giantleap.service.jobqueue.consumer` in
`giantleap.service.jobqueue.scripts_consumer`. KEYS[1] is the hash tag (`giantleap.service.jobqueue.keys`), from which
all other names are
built: they share one slot. ARGV[1] is `limits(settings)`. Time is the Redis server's, so hosts need no common clock.
Those of the lists of jobs and of webhooks stand in `giantleap.service.jobqueue.listing` and
`giantleap.service.webhooks.sender`.
"""

import json

from giantleap.service.settings import Settings

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

-- The queue in which a job waits; its part is '' or '+finish', and none in a record of before.
local function queue_of(id)
  local bundle, part = unpack(redis.call('HMGET', job_key(id), 'bundle', 'part'))
  return bundle .. (part or '')
end
local function lane_of(id)
  local bundle, part, priority = unpack(redis.call('HMGET', job_key(id), 'bundle', 'part', 'priority'))
  return bundle .. (part or '') .. ':' .. priority
end

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
  local lane = lane_of(id)
  local rank = redis.call('ZRANK', P .. ':queued:' .. lane, id)
  if not rank then return -1 end
  local queue, priority = string.match(lane, '^(.*):(.*)$')
  if priority == 'low' then rank = rank + redis.call('ZCARD', P .. ':queued:' .. queue .. ':high') end
  return rank
end

-- Seconds that a job of the queue usually runs, else one of any; nil before the first has ended.
local function median_duration_s(queue)
  local recent = redis.call('LRANGE', P .. ':durations:' .. queue, 0, -1)
  if #recent == 0 then recent = redis.call('LRANGE', P .. ':durations', 0, 30) end
  for i, text in ipairs(recent) do recent[i] = tonumber(text) end
  table.sort(recent)
  return recent[math.ceil(#recent / 2)]
end

-- All live workers, or those of one role (`giantleap.models.worker_role`).
local function live_workers(stages)
  local key = stages and P .. ':workers:' .. stages or P .. ':workers'
  return redis.call('ZCOUNT', key, now_ms - C.visibility_ms, '+inf')
end

-- The workers that take from a queue, and the jobs that they run: where none is of other stages only, all of them.
local function capacity_of(queue)
  local others = live_workers(string.sub(queue, -7) == '+finish' and 'generate' or 'decode')
  if others == 0 then return live_workers(), redis.call('SCARD', P .. ':running') end
  local running = 0
  for _, lane in ipairs({queue .. ':high', queue .. ':low'}) do
    running = running + redis.call('XLEN', P .. ':stream:' .. lane) - redis.call('ZCARD', P .. ':queued:' .. lane)
  end
  return live_workers() - others, running
end

-- Seconds as text until a job at this position starts: the jobs that must end first x median / live workers.
local function start_s(id, rank)
  if rank < 0 then return '' end
  local queue = queue_of(id)
  local each_s, workers, running = median_duration_s(queue), capacity_of(queue)
  if workers <= 0 or not each_s then return '' end
  return string.format('%.3f', math.max(0, rank + running + 1 - workers) * each_s / workers)
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
  local rank = position(id)
  emit(id, 'queued', string.format('{"position":%d}', rank))
  return rank
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

-- All of the record but the job itself, which whoever waits for it put in.
local function outcome(id)
  local told = {}
  for _, name in ipairs({'state', 'deliveries', 'started_at_s', 'finished_at_s', 'stages', 'results', 'warnings',
    'error', 'cancel'}) do
    told[name] = get(id, name) or nil
  end
  return cjson.encode(told)
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
  if stages == '{}' then stages = get(id, 'stages') or '{}' end  -- one that was handed over has some already
  redis.call('HSET', job, 'state', state, 'finished_at_s', now_s, 'stages', stages, 'input_bytes', 0)
  emit(id, 'done', '{"state":"' .. state .. '"}')
  redis.call('PEXPIRE', job, C.ttl_ms)
  redis.call('PEXPIRE', P .. ':events:' .. id, C.ttl_ms)
  redis.call('PUBLISH', P .. ':done', id .. ' ' .. outcome(id))
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

local function beat(consumer, device, stages)
  local sets = {P .. ':workers'}
  if stages ~= '' then sets[2] = P .. ':workers:' .. stages end
  for _, key in ipairs(sets) do
    redis.call('ZREMRANGEBYSCORE', key, '-inf', now_ms - 10 * C.visibility_ms)
    redis.call('ZADD', key, now_ms, consumer)
    redis.call('PEXPIRE', key, 10 * C.visibility_ms)
  end
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
