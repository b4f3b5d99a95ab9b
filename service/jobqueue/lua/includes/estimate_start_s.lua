-- @include queue_of
-- @include live_workers
-- @include median_duration_s

-- The number of workers that take from a queue, and of the jobs that they run. If every worker takes from
-- it, these are all workers and all running jobs.
local function capacity_of(queue)
  local others = live_workers(string.sub(queue, -7) == '+finish' and 'generate' or 'decode')
  if others == 0 then return live_workers(), redis.call('SCARD', prefix .. ':running') end
  local running = 0
  for _, lane in ipairs({queue .. ':high', queue .. ':low'}) do
    local waiting = redis.call('ZCARD', prefix .. ':queued:' .. lane)
    running = running + redis.call('XLEN', prefix .. ':stream:' .. lane) - waiting
  end
  return live_workers() - others, running
end

-- Estimated seconds until a job at this position starts: jobs that must end first x median duration / live workers.
-- Nil if nothing is known.
local function estimate_start_s(id, rank)
  local queue = queue_of(id)
  local median_s, workers, running = median_duration_s(queue), capacity_of(queue)
  if workers <= 0 or not median_s then return nil end
  return math.max(0, rank + running + 1 - workers) * median_s / workers
end
