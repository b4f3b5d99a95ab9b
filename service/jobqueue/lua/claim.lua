-- Claims jobs for a worker: due retries return to their streams, then stale messages are taken, then new ones. Jobs
-- that were canceled, are overdue or have been started too often are closed on the way.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- ARGV[2]  consumer, max_jobs, held (list of '<lane> <message>' that this consumer works on), lanes in the order in
--          which to take; some may not exist
-- Reply    claims (job, lane, message, delivery, input_bytes; stages and warnings of a job that was transferred), or,
--          if there are none, last_ids of each lane's stream and retry_ms until the next retry is due
-- @include arguments
-- @include now_s
-- @include close_failed
-- @include drop_message
-- @include end_overdue
-- @include push

local consumer, left, held = args.consumer, args.max_jobs, {}
for _, name in ipairs(args.held) do held[name] = true end
local claims, lanes = {}, {}
for _, lane in ipairs(args.lanes) do
  if redis.call('EXISTS', prefix .. ':stream:' .. lane) == 1 then
    lanes[#lanes + 1] = lane
    redis.call('SADD', prefix .. ':lanes', lane)  -- a server whose memory is full refuses here, before a job is taken
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

local function start(lane, message, id)
  local state, deliveries = get(id, 'state'), get_number(id, 'deliveries')
  redis.call('ZREM', prefix .. ':queued:' .. lane, id)
  if close_instead(id, state, deliveries) then return drop_message(lane, message) end
  deliveries = deliveries + 1
  redis.call('SADD', prefix .. ':running', id)
  local job, input_bytes, stages, warnings =
    unpack(redis.call('HMGET', job_key(id), 'job', 'input_bytes', 'stages', 'warnings'))
  redis.call('HSET', job_key(id), 'state', 'processing', 'deliveries', deliveries, 'begun_s', now_s,
    stages and 'begun_s' or 'started_at_s', now_s)  -- a job that was transferred has started before
  add_event(id, 'started', string.format('{"delivery":%d}', deliveries))
  claims[#claims + 1] = {
    job = job, lane = lane, message = message, delivery = deliveries, input_bytes = tonumber(input_bytes or 0),
    stages = stages or nil, warnings = warnings or nil,
  }
  left = left - 1
end

end_overdue()
for _, id in ipairs(redis.call('ZRANGEBYSCORE', prefix .. ':delayed', '-inf', now_ms, 'LIMIT', 0, 100)) do
  redis.call('ZREM', prefix .. ':delayed', id)
  push(id)
end

for _, lane in ipairs(lanes) do
  local stream = prefix .. ':stream:' .. lane
  local stale = redis.call('XPENDING', stream, GROUP, 'IDLE', config.visibility_ms, '-', '+', 1000)
  for _, entry in ipairs(stale) do
    if left > 0 and not (entry[2] == consumer and held[lane .. ' ' .. entry[1]]) then
      local claimed = redis.call('XCLAIM', stream, GROUP, consumer, 0, entry[1])
      if claimed[1] then start(lane, entry[1], claimed[1][2][2]) end
    end
  end
end

for _, lane in ipairs(lanes) do
  local read = true
  while left > 0 and read do
    local stream = prefix .. ':stream:' .. lane
    read = redis.call('XREADGROUP', 'GROUP', GROUP, consumer, 'COUNT', left, 'STREAMS', stream, '>')
    if read then
      for _, entry in ipairs(read[1][2]) do start(lane, entry[1], entry[2][2]) end
    end
  end
end
if #claims > 0 then return cjson.encode({claims = claims}) end

local last_ids = {}
for i, lane in ipairs(args.lanes) do
  local stream = prefix .. ':stream:' .. lane
  last_ids[i] = '0-0'
  local info = redis.call('EXISTS', stream) == 1 and redis.call('XINFO', 'STREAM', stream) or {}
  for j = 1, #info, 2 do
    if info[j] == 'last-generated-id' then last_ids[i] = info[j + 1] end
  end
end
local due = redis.call('ZRANGE', prefix .. ':delayed', 0, 0, 'WITHSCORES')
return cjson.encode({last_ids = last_ids, retry_ms = due[2] and math.max(0, tonumber(due[2]) - now_ms)})
