-- Lists the jobs of an owner, newest first. Forgets jobs whose record has expired.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- ARGV[2]  owner, max_jobs, and optionally state (only jobs in it) and cursor (of the page before)
-- Reply    records (`StoredJob`), next_cursor (absent at the end)
-- @include arguments
-- @include get
-- @include read_record

local list, jobs, last = prefix .. ':jobs:' .. args.owner, {}, nil
local below = args.cursor and '(' .. args.cursor or '+inf'

local function reply(next_cursor)
  return cjson.encode({records = #jobs > 0 and jobs or nil, next_cursor = next_cursor})
end

while true do
  local rows = redis.call('ZREVRANGEBYSCORE', list, below, '-inf', 'WITHSCORES', 'LIMIT', 0, 100)
  if #rows == 0 then return reply(nil) end
  for i = 1, #rows, 2 do
    local id = rows[i]
    local state = get(id, 'state')
    if not state then
      redis.call('ZREM', list, id)
    elseif not args.state or state == args.state then
      if #jobs == args.max_jobs then return reply(last) end
      jobs[#jobs + 1] = read_record(id)
    end
    last = rows[i + 1]
  end
  below = '(' .. last
end
