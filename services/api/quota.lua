-- Moving windows: at most so many in any stretch of that length, by Redis's own clock, and what is
-- left of them; all clients of a moment in one round trip. (The library's own needs two a client, and
-- trusts each replica's clock.)
-- A request counts once: Nginx sends it again when its replica dies, and by then it may be written.
--
-- KEYS[1] the gap: as long as it stands, what is counted here is not all
-- KEYS[2] and on: a sorted set a request, of its client: id of the request -> when it counted, ms
-- ARGV[1] how many are allowed     ARGV[2] length of the window, milliseconds
-- ARGV[3] '1' to open a gap for one window      ARGV[4] and on: the ids of the requests
-- Returns 1 or 0, whether there is a gap; then for each request: 1 when it is allowed, how many are
-- left, milliseconds until all of the quota is free again, milliseconds until one is.

local limit, window = tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local now_text, ended = string.format('%.0f', now), now - window

if ARGV[3] == '1' then
  redis.call('SET', KEYS[1], 1, 'PX', window)
end
local answer = {redis.call('EXISTS', KEYS[1])}

for place = 2, #KEYS do
  local key, id = KEYS[place], ARGV[place + 2]
  local oldest = tonumber(redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')[2])
  if oldest and oldest <= ended then
    redis.call('ZREMRANGEBYSCORE', key, '-inf', string.format('%.0f', ended))
    oldest = tonumber(redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')[2])
  end
  local used = redis.call('ZCARD', key)
  local allowed, newest = false, nil
  if used >= limit then
    allowed = redis.call('ZSCORE', key, id)
  else
    allowed = true
    if redis.call('ZADD', key, 'NX', now_text, id) == 1 then
      redis.call('PEXPIRE', key, window)
      used, newest, oldest = used + 1, now, oldest or now
    end
  end
  newest = newest or tonumber(redis.call('ZRANGE', key, -1, -1, 'WITHSCORES')[2]) or now
  local at = #answer
  answer[at + 1] = allowed and 1 or 0
  answer[at + 2] = math.max(0, limit - used)
  answer[at + 3] = newest + window - now
  answer[at + 4] = used < limit and 0 or oldest + window - now
end
return answer
