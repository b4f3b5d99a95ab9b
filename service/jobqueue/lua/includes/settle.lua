-- @include claim_fence
-- @include close_overdue
-- @include drop_message
-- @include is_final
local token = args.consumer .. ' ' .. args.message .. ' ' .. args.delivery .. ' '

local function owns_claim() return owns(args.consumer, args) end
local function reply(status) return cjson.encode({status = status}) end

-- The reply to a worker that does not own the claim. If it settled the job and lost the reply, it gets the same again.
local function reply_not_owned()
  local settled = get(args.id, 'settled') or ''
  return reply(string.sub(settled, 1, #token) == token and string.sub(settled, #token + 1) or 'lost')
end

local function drop_claim()
  drop_message(args.lane, get(args.id, 'message') or args.message)
  redis.call('HDEL', job_key(args.id), 'worker', 'message')
end

local function settle(status)
  redis.call('HSET', job_key(args.id), 'settled', token .. status)
  drop_claim()
  return reply(status)
end

-- Whether a deadline has ended the job; then the claim no longer counts.
local function end_if_overdue(stages)
  local final = is_final(get(args.id, 'state'))
  if not final and not is_overdue(args.id) then return false end
  if not final then close_overdue(args.id, stages) end
  drop_claim()
  return true
end
