-- @include add_blob_bytes
-- @include add_event
-- @include get_number
-- @include lane_of
-- @include now_s
-- @include pay
-- @include record_blob
-- @include stored_fields

-- The script that ends a job also writes the delivery of its webhook, so that none is lost.
local function enqueue_webhook(id, state, webhook)
  local target, wanted = cjson.decode(webhook), false
  for _, event in ipairs(target.events) do wanted = wanted or event == state end
  if not wanted then return end
  if redis.call('ZCARD', prefix .. ':webhooks') >= config.webhook_limit then
    redis.call('XADD', prefix .. ':webhooks_dead', 'MAXLEN', '~', 1000, '*', 'job', id, 'reason', 'too many wait')
    return
  end
  local delivery = string.format('%s-%.0f', id, now_ms)
  redis.call('HSET', prefix .. ':webhook:' .. delivery, 'url', target.url, 'job', id, 'state', state, 'attempts', 0,
    'bundle', get(id, 'bundle'), 'finished_at_s', now_s, 'error', get(id, 'error') or '',
    'results', state == 'succeeded' and get(id, 'results') or '[]')
  redis.call('PEXPIRE', prefix .. ':webhook:' .. delivery, config.webhook_ttl_ms)
  redis.call('ZADD', prefix .. ':webhooks', now_ms, delivery)
end

-- Gives up the input of a job, or leaves it until it expires, to be evicted as results are.
local function release_input(id, keeps_input)
  if keeps_input then redis.call('HSET', job_key(id), 'keeps_input', 1) end  -- also one in the result store
  local input_bytes = get_number(id, 'input_bytes')
  if input_bytes == 0 then return end
  if keeps_input then
    redis.call('PEXPIRE', prefix .. ':input:' .. id, config.ttl_ms)
    record_blob(id, input_bytes)
  else
    redis.call('UNLINK', prefix .. ':input:' .. id)
    add_blob_bytes(-input_bytes)
  end
end

-- Gives the work of a job that no worker started back to the budget of its owner.
local function give_back(id, owner)
  local cost_us = get_number(id, 'cost_us')
  if cost_us > 0 and get_number(id, 'deliveries') == 0 and not get(id, 'stages') then
    pay(prefix .. ':work:' .. (owner or ''), -cost_us)
  end
end

-- Brings a job into a final state and publishes its outcome. With the stages '{}' those recorded earlier stay.
local function close_job(id, state, stages, keeps_input)
  local job, lane = job_key(id), lane_of(id)
  local latent_px, deadline_ms, webhook, owner =
    unpack(redis.call('HMGET', job, 'latent_px', 'deadline_ms', 'webhook', 'owner'))
  release_input(id, keeps_input)
  give_back(id, owner)
  redis.call('ZREM', prefix .. ':queued:' .. lane, id)
  redis.call('ZREM', prefix .. ':delayed', id)
  redis.call('SREM', prefix .. ':running', id)
  redis.call('SREM', prefix .. ':live:' .. (owner or ''), id)
  if latent_px then redis.call('DECRBY', prefix .. ':queued_px', latent_px) end
  if deadline_ms then redis.call('ZREM', prefix .. ':deadlines', id) end
  if webhook then enqueue_webhook(id, state, webhook) end
  if stages == '{}' then stages = get(id, 'stages') or '{}' end
  redis.call('HSET', job, 'state', state, 'finished_at_s', now_s, 'stages', stages, 'input_bytes', 0)
  add_event(id, 'done', '{"state":"' .. state .. '"}')
  if state ~= 'succeeded' then redis.call('UNLINK', prefix .. ':preview:' .. id) end
  redis.call('PEXPIRE', job, config.ttl_ms)
  redis.call('PEXPIRE', prefix .. ':events:' .. id, config.ttl_ms)
  redis.call('PUBLISH', prefix .. ':done', id .. ' ' .. cjson.encode(stored_fields(id)))
end
