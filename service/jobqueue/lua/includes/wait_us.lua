-- @include paid_us
-- How long until an allowance covers a cost; not above 0 where it does now.
local function wait_us(key, cost_us) return math.ceil(paid_us(key) + cost_us - now_us - 60000000) end
