-- The settings, as `to_config` in scripts.py writes them.
local config = cjson.decode(ARGV[1])
