-- Finds the jobs that shall not be worked on: canceled, or past their deadline.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- ARGV[2]  ids
-- Reply    ids
-- @include arguments
-- @include is_overdue

local stopped = {}
for _, id in ipairs(args.ids) do
  if get(id, 'cancel') or is_overdue(id) then stopped[#stopped + 1] = id end
end
return cjson.encode({ids = #stopped > 0 and stopped or nil})  -- cjson writes an empty table as {}
