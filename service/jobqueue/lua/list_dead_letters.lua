-- Lists the jobs that failed for good, the latest first.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- ARGV[2]  max_jobs
-- Reply    letters: id, lane, deliveries, error (JSON text), failed_at_ms, job (JSON text; absent once the record has
--          expired), has_input (whether an input is there for another attempt)
-- @include prefix
-- @include arguments
-- @include get

local letters = {}
for i, entry in ipairs(redis.call('XREVRANGE', prefix .. ':dead', '+', '-', 'COUNT', args.max_jobs)) do
  local letter = {failed_at_ms = tonumber(string.match(entry[1], '^%d+'))}
  for j = 1, #entry[2], 2 do letter[entry[2][j]] = entry[2][j + 1] end
  letter.id, letter.job = letter.job, get(letter.job, 'job') or nil
  local is_stored = get(letter.id, 'input_key') and get(letter.id, 'keeps_input')
  letter.has_input = is_stored and true or redis.call('EXISTS', prefix .. ':input:' .. letter.id) == 1
  letters[i] = letter
end
return cjson.encode({letters = #letters > 0 and letters or nil})  -- cjson writes an empty table as {}
