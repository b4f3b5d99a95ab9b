-- Claims jobs for a worker: due retries return to their streams; then come claims of this worker whose reply was lost,
-- stale messages and new ones. Jobs that were canceled, are overdue or were started too often are closed on the way.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- ARGV[2]  consumer, max_jobs, held (ids of jobs that this worker runs or cannot read), dropped (ids of its jobs that
--          count as stale when their time is up), lanes in the order in which to take; some may not exist. Optional,
--          of a worker that holds a part of its bundles: loaded (their names), loaded_first (whether their jobs go
--          before older ones). Optional, of a worker whose device is busy: ahead (takes new jobs that were never
--          started, and only if enough wait for every live worker)
-- Reply    claims (id, job, lane, message, delivery, input_bytes, input_key, waited_s; stages and warnings of a
--          job that was transferred), or, if there are none, last_ids of each lane's stream and retry_ms until the next
--          retry is due
-- @include arguments
-- @include now_s
-- @include close_failed
-- @include drop_message
-- @include end_overdue
-- @include live_workers
-- @include outage
-- @include push

local consumer, left = args.consumer, args.max_jobs
local claims, lanes, held, dropped = {}, {}, {}, {}
for _, id in ipairs(args.held) do held[id] = true end
for _, id in ipairs(args.dropped) do dropped[id] = true end
for _, lane in ipairs(args.lanes) do
  if redis.call('EXISTS', stream_key(lane)) == 1 or redis.call('SISMEMBER', prefix .. ':lanes', lane) == 1 then
    lanes[#lanes + 1] = lane
    ensure_group(lane)  -- a server whose memory is full refuses here, before a job is taken
  end
end

local function close_instead(id, state, deliveries)
  if not state or is_final(state) then
    return true
  elseif get(id, 'cancel') then
    close_job(id, 'canceled', '{}')
    return true
  elseif is_overdue(id) then
    close_overdue(id, '{}')
    return true
  elseif deliveries >= config.max_deliveries then
    local detail = 'It was started ' .. deliveries .. ' times and each time its worker was lost; it is not tried again.'
    close_failed(id, get(id, 'error') or cjson.encode({code = 'job_failed', detail = detail, retryable = false}), '{}')
    return true
  end
  return false
end

-- The id of the job that a message names; nil if the message was deleted.
local function job_of(lane, message)
  local entry = redis.call('XRANGE', stream_key(lane), message, message)[1]
  return entry and entry[2][2]
end

-- Starts the job of a message that is now this worker's, unless it is to be closed. `resumed`: its start was counted.
local function start(lane, message, id, resumed)
  local state, deliveries = get(id, 'state'), get_number(id, 'deliveries')
  redis.call('ZREM', prefix .. ':queued:' .. lane, id)
  if close_instead(id, state, resumed and 0 or deliveries) then
    if state then redis.call('HDEL', job_key(id), 'worker', 'message') end
    return drop_message(lane, message)
  end
  redis.call('SADD', prefix .. ':running', id)
  local job, input_bytes, created_at_s, stages, warnings, input_key =
    unpack(redis.call('HMGET', job_key(id), 'job', 'input_bytes', 'created_at_s', 'stages', 'warnings', 'input_key'))
  if not resumed then
    deliveries = deliveries + 1
    redis.call('HSET', job_key(id), 'state', 'processing', 'deliveries', deliveries, 'begun_s', now_s,
      'worker', consumer, 'message', message,
      stages and 'begun_s' or 'started_at_s', now_s)  -- a job that was transferred has started before
    add_event(id, 'started', string.format('{"delivery":%d}', deliveries))
  end
  claims[#claims + 1] = {
    id = id, job = job, lane = lane, message = message, delivery = deliveries, input_bytes = tonumber(input_bytes or 0),
    waited_s = created_at_s and math.max(0, tonumber(now_s) - tonumber(created_at_s)) or nil,
    stages = stages or nil, warnings = warnings or nil, input_key = input_key or nil,
  }
  held[id], left = true, left - 1
end

local function runs_here(id)
  return get(id, 'state') == 'processing' and get(id, 'worker') == consumer and not dropped[id]
end

-- Claims of this worker that it does not know of: it lost the reply.
local function resume(lane)
  for _, entry in ipairs(redis.call('XPENDING', stream_key(lane), GROUP, '-', '+', 1000, consumer)) do
    local id = left > 0 and job_of(lane, entry[1])
    if id and not held[id] and runs_here(id) then
      redis.call('XCLAIM', stream_key(lane), GROUP, consumer, 0, entry[1], 'JUSTID')
      start(lane, entry[1], id, true)
    end
  end
end

local function take_stale(lane, only_released)
  local stream = stream_key(lane)
  for _, entry in ipairs(redis.call('XPENDING', stream, GROUP, 'IDLE', config.visibility_ms, '-', '+', 1000)) do
    local is_free = left > 0 and (entry[2] == 'released' or not only_released)
    if is_free and not held[job_of(lane, entry[1])] then
      local claimed = redis.call('XCLAIM', stream, GROUP, consumer, 0, entry[1])
      if claimed[1] then start(lane, entry[1], claimed[1][2][2]) end
    end
  end
end

-- A message is delivered again, though its job runs, if somebody destroyed the group: then it returns to its worker. A
-- job that this worker cannot read goes to the others, as one that was released; so does, ahead, one that was started
-- before, which is to run alone.
local function start_new(lane, message, id)
  local state, stream = get(id, 'state'), stream_key(lane)
  local worker = state == 'processing' and get(id, 'worker')
  if worker and (worker ~= consumer or held[id] or dropped[id]) then
    redis.call('XCLAIM', stream, GROUP, worker, 0, message, 'JUSTID')
  elseif state == 'queued' and (held[id] or args.ahead and get_number(id, 'deliveries') > 0) then
    redis.call('XCLAIM', stream, GROUP, 'released', 0, message, 'IDLE', 86400000 + config.visibility_ms, 'JUSTID')
  else
    start(lane, message, id, worker)
  end
end

local function take_new(lane)
  local read = true
  while left > 0 and read do
    read = redis.call('XREADGROUP', 'GROUP', GROUP, consumer, 'COUNT', left, 'STREAMS', stream_key(lane), '>')
    if read then
      for _, entry in ipairs(read[1][2]) do start_new(lane, entry[1], entry[2][2]) end
    end
  end
end

-- What may be taken together: lanes of loaded bundles, which are the group `true`, or of one other bundle.
local loaded = {}
for _, bundle in ipairs(args.loaded or {}) do loaded[bundle] = true end
local function group_of(lane)
  local bundle = string.match(lane, '^[^+:]+')
  return loaded[bundle] or bundle
end

local function take_group(group)
  for _, lane in ipairs(lanes) do
    if group_of(lane) == group then take_new(lane) end
  end
end

-- The group, of those not tried, whose job has waited longest at a priority; nil if no job waits.
local function find_group(priority, tried)
  local found, oldest_us
  for _, lane in ipairs(lanes) do
    local group = group_of(lane)
    if string.match(lane, ':(%w+)$') == priority and not tried[group] then
      local first = redis.call('ZRANGE', prefix .. ':queued:' .. lane, 0, 0, 'WITHSCORES')
      local goes_first = group == true and args.loaded_first
      local queued_us = first[2] and (goes_first and 0 or tonumber(first[2]))
      if queued_us and (not oldest_us or queued_us < oldest_us) then found, oldest_us = group, queued_us end
    end
  end
  return found
end

-- Takes jobs of one group: that of a job which this worker has again, else the one to take first at the first priority
-- at which a job waits.
local function take_new_of_one_group()
  for _, lane in ipairs(lanes) do
    -- Messages of jobs that have ended, or of those that run, if somebody destroyed the group.
    if redis.call('ZCARD', prefix .. ':queued:' .. lane) == 0 then take_new(lane) end
  end
  if #claims > 0 then return take_group(group_of(claims[1].lane)) end
  local tried = {}
  for _, lane in ipairs(lanes) do
    local group = true
    while #claims == 0 and group do
      group = find_group(string.match(lane, ':(%w+)$'), tried)
      tried[group or ''] = true
      if group then take_group(group) end
    end
  end
end

-- Whether to claim for a device that is still busy. A worker that has nothing to do must find a job, so all get as many
-- as this one takes. A job that was started before and is free comes first, to the next worker that is ready for it.
local function may_claim_ahead()
  local waiting = 0
  for _, lane in ipairs(lanes) do
    waiting = waiting + redis.call('ZCARD', prefix .. ':queued:' .. lane)
    local stale = redis.call('XPENDING', stream_key(lane), GROUP, 'IDLE', config.visibility_ms, '-', '+', 1000)
    for _, entry in ipairs(stale) do
      if not held[job_of(lane, entry[1])] then return false end
    end
  end
  return waiting >= left * math.max(1, live_workers())
end

end_overdue()
for _, id in ipairs(redis.call('ZRANGEBYSCORE', prefix .. ':delayed', '-inf', now_ms, 'LIMIT', 0, 100)) do
  redis.call('ZREM', prefix .. ':delayed', id)
  if get(id, 'state') == 'queued' then push(id) end  -- the record may be gone
end
local may_renew = now_ms - serves_since_ms() < config.visibility_ms
if args.ahead and not may_claim_ahead() then return '{}' end
if not args.ahead then
  for _, lane in ipairs(lanes) do resume(lane) end
  for _, lane in ipairs(lanes) do take_stale(lane, may_renew) end
end
if args.loaded then
  take_new_of_one_group()
else
  for _, lane in ipairs(lanes) do take_new(lane) end
end
if #claims > 0 then return cjson.encode({claims = claims}) end

local last_ids = {}
for i, lane in ipairs(args.lanes) do
  local stream = stream_key(lane)
  last_ids[i] = '0-0'
  local info = redis.call('EXISTS', stream) == 1 and redis.call('XINFO', 'STREAM', stream) or {}
  for j = 1, #info, 2 do
    if info[j] == 'last-generated-id' then last_ids[i] = info[j + 1] end
  end
end
local due = redis.call('ZRANGE', prefix .. ':delayed', 0, 0, 'WITHSCORES')
return cjson.encode({last_ids = last_ids, retry_ms = due[2] and math.max(0, tonumber(due[2]) - now_ms)})
