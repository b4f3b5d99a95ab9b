local args = cjson.decode(ARGV[2])
