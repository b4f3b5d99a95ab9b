"""The scripts that `giantleap.service.jobqueue.consumer` runs: a worker takes jobs, keeps them and ends each once. See
`giantleap.service.jobqueue.scripts`."""

# What `giantleap.service.jobqueue.consumer` sends to name one claim, and the fence that stands before every write of a
# worker.
_OWNER = """
local consumer, lane, message, id, delivery = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local stream, token = P .. ':stream:' .. lane, consumer .. ' ' .. message .. ' ' .. delivery

local function owns()
  local pending = redis.call('XPENDING', stream, GROUP, message, message, 1)
  return #pending == 1 and pending[1][2] == consumer and get(id, 'deliveries') == delivery
end

-- A worker that lost the reply sends again: it is told what its first call did.
local function already_settled() return get(id, 'settled') == token and 1 or 0 end
local function settle()
  redis.call('HSET', job_key(id), 'settled', token)
  drop_message(lane, message)
end

-- The worker's time that the job took of its queue, for estimates: jobs of one batch share it.
local function keep_duration(list, most, batch_jobs)
  redis.call('LPUSH', list, string.format('%.6f', (now_us / 1000000 - get_number(id, 'begun_s')) / batch_jobs))
  redis.call('LTRIM', list, 0, most)
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

# ARGV: limits, consumer, device JSON or '', stages or '' for all, lanes ... Makes the groups, those of finish queues
# only for a worker that is of their stages alone, and forgets consumers of dead workers that hold nothing.
OPEN = """
for i = 5, #ARGV do
  local stream = P .. ':stream:' .. ARGV[i]
  if ARGV[4] ~= '' or not string.find(ARGV[i], '+finish:', 1, true) then ensure_group(ARGV[i]) end
  local known = redis.call('EXISTS', stream) == 1 and redis.call('XINFO', 'CONSUMERS', stream, GROUP) or {}
  for _, info in ipairs(known) do
    local consumer = {}
    for j = 1, #info, 2 do consumer[info[j]] = info[j + 1] end
    if consumer.pending == 0 and consumer.idle > 3600000 then
      redis.call('XGROUP', 'DELCONSUMER', stream, GROUP, consumer.name)
    end
  end
end
beat(ARGV[2], ARGV[3], ARGV[4])
"""

# ARGV: limits, consumer, stages or '', lanes ... A consumer that still holds messages is kept: deleting it would lose
# them.
CLOSE = """
redis.call('ZREM', P .. ':workers', ARGV[2])
redis.call('ZREM', P .. ':workers:' .. ARGV[3], ARGV[2])
redis.call('HDEL', P .. ':devices', ARGV[2])
for i = 4, #ARGV do
  local stream = P .. ':stream:' .. ARGV[i]
  if redis.call('EXISTS', stream) == 1 and #redis.call('XPENDING', stream, GROUP, '-', '+', 1, ARGV[2]) == 0 then
    redis.call('XGROUP', 'DELCONSUMER', stream, GROUP, ARGV[2])
  end
end
"""

# ARGV: limits, consumer, most jobs, JSON list of '<lane> <message>' that this consumer works on, lanes in the order
# in which to take, of which some may not be there. Replies {claims, last id of each lane's stream, ms until the next
# retry is due or -1}; a claim of a job that was handed over has the stages and warnings of before.
CLAIM = """
local consumer, left, held = ARGV[2], tonumber(ARGV[3]), {}
for _, name in ipairs(cjson.decode(ARGV[4])) do held[name] = true end
local taken, lanes = {}, {}
for i = 5, #ARGV do
  if redis.call('EXISTS', P .. ':stream:' .. ARGV[i]) == 1 then
    lanes[#lanes + 1] = ARGV[i]
    redis.call('SADD', P .. ':lanes', ARGV[i])  -- a server whose memory is full refuses here, before it gives a job
  end
end

local function begin(lane, message, id)
  local state, deliveries = get(id, 'state'), get_number(id, 'deliveries')
  if not state or is_final(state) then
    redis.call('ZREM', P .. ':queued:' .. lane, id)
    return drop_message(lane, message)
  end
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
  local job, input_bytes, stages, warnings =
    unpack(redis.call('HMGET', job_key(id), 'job', 'input_bytes', 'stages', 'warnings'))
  redis.call('HSET', job_key(id), 'state', 'processing', 'deliveries', deliveries, 'begun_s', now_s,
    stages and 'begun_s' or 'started_at_s', now_s)  -- a job that was handed over has started before
  emit(id, 'started', string.format('{"delivery":%d}', deliveries))
  taken[#taken + 1] = {job, lane, message, deliveries, tonumber(input_bytes or 0), stages or '{}', warnings or '[]'}
  left = left - 1
end

end_overdue()
for _, id in ipairs(redis.call('ZRANGEBYSCORE', P .. ':delayed', '-inf', now_ms, 'LIMIT', 0, 100)) do
  redis.call('ZREM', P .. ':delayed', id)
  push(id)
end

for _, lane in ipairs(lanes) do
  local stale = redis.call('XPENDING', P .. ':stream:' .. lane, GROUP, 'IDLE', C.visibility_ms, '-', '+', 1000)
  for _, entry in ipairs(stale) do
    if left > 0 and not (entry[2] == consumer and held[lane .. ' ' .. entry[1]]) then
      local claimed = redis.call('XCLAIM', P .. ':stream:' .. lane, GROUP, consumer, 0, entry[1])
      if claimed[1] then begin(lane, entry[1], claimed[1][2][2]) end
    end
  end
end

for _, lane in ipairs(lanes) do
  local read = true
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
    local stream, last_id = P .. ':stream:' .. ARGV[i], '0-0'
    local info = redis.call('EXISTS', stream) == 1 and redis.call('XINFO', 'STREAM', stream) or {}
    for j = 1, #info, 2 do
      if info[j] == 'last-generated-id' then last_id = info[j + 1] end
    end
    last_ids[#last_ids + 1] = last_id
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

# ARGV: limits, consumer, device and stages as for OPEN, then lane, message, job id, delivery of each claim held.
# Replies the ids of the jobs lost. The owner is checked before XCLAIM: an unconditional one would take a message back
# from its new owner.
RENEW = """
beat(ARGV[2], ARGV[3], ARGV[4])
local lost = {}
for i = 5, #ARGV, 4 do
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

# ARGV: limits, the claim, results JSON, stages JSON, warnings JSON, jobs of the batch, name of the uploaded results
# (`giantleap.service.jobqueue.blobs`) or '', their number, their bytes. Replies 1, 0 lost, -1 no room, -2 the upload is
# not there.
FINISH = (
    _OWNER
    + """
local upload, files, bytes = ARGV[11], tonumber(ARGV[12]), tonumber(ARGV[13])
local function refuse(code)
  if upload ~= '' then redis.call('UNLINK', upload) end
  return code
end
if not owns() then return refuse(already_settled()) end
if past(ARGV[8]) then return refuse(0) end
if upload ~= '' and redis.call('HLEN', upload) ~= files + 1 then return refuse(-2) end
if not make_room(bytes - get_number(id, 'input_bytes')) then return refuse(-1) end
if upload ~= '' then
  redis.call('HDEL', upload, '')
  redis.call('RENAME', upload, P .. ':result:' .. id)
  redis.call('PEXPIRE', P .. ':result:' .. id, C.ttl_ms)
  redis.call('ZADD', P .. ':blob_results', string.format('%.3f', now_us / 1000 + C.ttl_ms), id)
  redis.call('HSET', P .. ':blob_sizes', id, bytes)
  count_bytes(bytes)
end
redis.call('HSET', job_key(id), 'results', ARGV[7], 'warnings', ARGV[9])
redis.call('HDEL', job_key(id), 'error')
keep_duration(P .. ':durations', 99, tonumber(ARGV[10]))
keep_duration(P .. ':durations:' .. queue_of(id), 30, tonumber(ARGV[10]))
close_job(id, 'succeeded', ARGV[8])
settle()
return 1
"""
)

# ARGV: limits, the claim, stages JSON, warnings JSON, jobs of the batch, latents or '' where the input is one. Replies
# 1, 0 lost, -1 no room, 2 canceled. The latents take the place of the input, and the job waits anew, all its starts
# before it.
HAND_OVER = (
    _OWNER
    + """
local stages, warnings, latents, held = ARGV[7], ARGV[8], ARGV[10], get_number(id, 'input_bytes')
if not owns() then return already_settled() end
if past(stages) then return 0 end
if get(id, 'cancel') then
  close_job(id, 'canceled', stages)
  settle()
  return 2
end
if latents ~= '' then
  if not make_room(#latents - held) then return -1 end
  redis.call('SET', P .. ':input:' .. id, latents)
  count_bytes(#latents - held)
  redis.call('HSET', job_key(id), 'input_bytes', #latents, 'stages', stages, 'warnings', warnings)
  keep_duration(P .. ':durations:' .. queue_of(id), 30, tonumber(ARGV[9]))
end
redis.call('HSET', job_key(id), 'part', '+finish', 'deliveries', 0)
redis.call('HDEL', job_key(id), 'error')
redis.call('SREM', P .. ':running', id)
settle()
push(id)
return 1
"""
)

# ARGV: limits, the claim, error JSON, '1' if retryable, stages JSON. Replies 1, or 0 where the claim is lost.
FAIL = (
    _OWNER
    + """
if not owns() then return already_settled() end
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
if not owns() then return already_settled() end
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
