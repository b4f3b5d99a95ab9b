-- @include blob_bytes
-- @include config
-- @include free_expired

-- Makes room for more bytes: evicts the oldest results, or nothing if even that is not enough.
local function make_room(bytes)
  free_expired()
  if bytes <= 0 then return true end
  local over = blob_bytes() + bytes - config.budget_bytes
  local victims = {}
  if over > 0 then
    for _, id in ipairs(redis.call('ZRANGE', prefix .. ':blob_results', 0, -1)) do
      if over <= 0 then break end
      over = over - result_bytes(id)
      victims[#victims + 1] = id
    end
  end
  if over > 0 then return false end
  for _, id in ipairs(victims) do free_results(id) end
  return true
end
