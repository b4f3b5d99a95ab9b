-- Takes or renews the turn to sweep the result store, and names those of some files that no job needs: its record has
-- expired, or it has ended and its record does not name the file.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- ARGV[2]  sweeper, turn_ms (how long its turn lasts), files (job and key of each; may be absent)
-- Reply    granted (false: the turn is another sweeper's), now_s, keys (of the files to delete)
-- @include arguments
-- @include clock
-- @include is_final
-- @include job_key

local turn = prefix .. ':sweeper'
local holder = redis.call('GET', turn)
local now_s = math.floor(now_ms / 1000)
if holder and holder ~= args.sweeper then return cjson.encode({granted = false, now_s = now_s}) end
redis.call('SET', turn, args.sweeper, 'PX', args.turn_ms)

local function is_named(id, key)
  local results, input_key, keeps_input, state =
    unpack(redis.call('HMGET', job_key(id), 'results', 'input_key', 'keeps_input', 'state'))
  if not state then return false end
  if not is_final(state) or (results and string.find(results, '"' .. key .. '"', 1, true)) then return true end
  return keeps_input and input_key == key
end

local keys = {}
for _, file in ipairs(args.files or {}) do
  if not is_named(file.job, file.key) then keys[#keys + 1] = file.key end
end
return cjson.encode({granted = true, now_s = now_s, keys = #keys > 0 and keys or nil})
