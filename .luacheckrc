-- Checks the scripts as `python -m giantleap.service.jobqueue.scripts` writes them, with their includes resolved.
std = "lua51"
read_globals = {"redis", "cjson", "KEYS", "ARGV"}
max_line_length = 120
ignore = {"211/now_ms"}  -- includes/clock.lua gives the time in two units; some scripts read one of them
