-- Adds a preview to a job as an event whose image is stored beside it for a short time. Dropped if the claim is lost,
-- or if the blobs leave no room: results go before previews.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- ARGV[2]  the claim (see claim_fence), name, data (JSON text)
-- ARGV[3]  the image
-- Reply    nothing
-- @include claim_fence
-- @include is_final
-- @include add_event
-- @include blob_bytes

local image, previews = ARGV[3], prefix .. ':preview:' .. args.id
if not owns(args.consumer, args) or is_final(get(args.id, 'state')) or get(args.id, 'cancel') then return end
if blob_bytes() + #image > config.budget_bytes or redis.call('HLEN', previews) >= config.preview_limit then return end
redis.call('HSET', previews, add_event(args.id, args.name, args.data), image)
redis.call('PEXPIRE', previews, config.preview_ttl_ms)
