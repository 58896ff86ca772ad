-- A moving window: at most so many in any stretch of that length, by Redis's own clock, and what is
-- left of it, in one round trip. (The library's own needs two, and trusts each replica's clock.)
--
-- KEYS[1] list of the times that count, newest first, in milliseconds
-- ARGV[1] how many are allowed     ARGV[2] length of the window, milliseconds
-- Returns {1 when this one is allowed, how many are left, milliseconds until all of the quota is
-- free again, milliseconds until one is}.

local key, limit, window = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

while true do
  local oldest = tonumber(redis.call('LINDEX', key, -1) or nil)
  if not oldest or oldest > now - window then break end
  redis.call('RPOP', key)
end

local used = redis.call('LLEN', key)
local allowed = used < limit and 1 or 0
if allowed == 1 then
  redis.call('LPUSH', key, string.format('%.0f', now))
  redis.call('PEXPIRE', key, window)
  used = used + 1
end
local newest = tonumber(redis.call('LINDEX', key, 0) or nil) or now
local oldest = tonumber(redis.call('LINDEX', key, -1) or nil) or now
local free = used < limit and 0 or oldest + window - now
return {allowed, limit - used, newest + window - now, free}
