local function is_final(state) return state == 'succeeded' or state == 'failed' or state == 'canceled' end
