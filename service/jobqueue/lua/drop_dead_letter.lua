-- Removes a job from the dead-letter stream; its record stays until it expires.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- ARGV[2]  id
-- Reply    dropped
-- @include arguments
-- @include drop_dead

return cjson.encode({dropped = drop_dead(args.id)})
