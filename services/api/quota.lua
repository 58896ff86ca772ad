-- A moving window: at most so many in any stretch of that length, by Redis's own clock, and what is
-- left of it, in one round trip. (The library's own needs two, and trusts each replica's clock.)
-- A request counts once: Nginx sends it again when its replica dies, and by then it may be written.
--
-- KEYS[1] sorted set: id of the request -> when it counted, milliseconds
-- ARGV[1] how many are allowed     ARGV[2] length of the window, milliseconds     ARGV[3] the id
-- Returns {1 when this one is allowed, how many are left, milliseconds until all of the quota is
-- free again, milliseconds until one is}.

local key, limit, window, id = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

redis.call('ZREMRANGEBYSCORE', key, '-inf', string.format('%.0f', now - window))
local used = redis.call('ZCARD', key)
local known = redis.call('ZSCORE', key, id)
if not known and used < limit then
  redis.call('ZADD', key, string.format('%.0f', now), id)
  redis.call('PEXPIRE', key, window)
  known, used = true, used + 1
end
local newest = redis.call('ZRANGE', key, -1, -1, 'WITHSCORES')[2] or now
local oldest = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')[2] or now
local free = used < limit and 0 or oldest + window - now
return {known and 1 or 0, limit - used, newest + window - now, free}
