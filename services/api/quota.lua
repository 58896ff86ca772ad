-- Moving windows: at most so many in any stretch of that length, by Redis's own clock, and what is
-- left of them; all clients of a moment in one round trip. (The library's own needs two a client, and
-- trusts each replica's clock.)
-- A request counts once: Nginx sends it again when its replica dies, and by then it may be written.
--
-- KEYS[1] the gap: as long as it stands, what is counted here is not all
-- KEYS[2] and on: for each request, what its client has spent
-- ARGV[1] how many are allowed     ARGV[2] length of the window, milliseconds
-- ARGV[3] '1' to open a gap for one window      ARGV[4] and on: the ids of the requests, 8 bytes each
-- Returns 1 or 0, whether there is a gap; then for each request: 1 when it is allowed, how many are
-- left, milliseconds until all of the quota is free again, milliseconds until one is.

-- Up to this limit what is spent is a log: 14 bytes for each request, oldest first, the id and when it
-- counted (6 bytes, milliseconds). It is read whole, with two commands a request where a sorted set
-- takes four: Valkey spends 10 microseconds instead of 14, and less memory. Above it, a sorted set.
local LOG_MAX = 1000
local RECORD, ID = 14, 8

local limit, window = tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local ended = now - window

if ARGV[3] == '1' then
  redis.call('SET', KEYS[1], 1, 'PX', window)
end
local answer = {redis.call('EXISTS', KEYS[1])}

local function counted_at(log, place)
  local at = struct.unpack('>I6', log, place + ID)
  return at
end

local function has(log, id, place)
  place = string.find(log, id, place, true)
  while place and place % RECORD ~= 1 do  -- Not an id, but the end of one and what follows.
    place = string.find(log, id, place + 1, true)
  end
  return place
end

-- Where the clock was set back: a record that stayed in the future would keep those after it from ending.
local function until_now(log, first, last)
  local records = {}
  for place = first, last, RECORD do
    local at = math.min(now, counted_at(log, place))
    records[#records + 1] = string.sub(log, place, place + ID - 1) .. struct.pack('>I6', at)
  end
  return table.concat(records)
end

-- Both return whether the request is allowed, how many count, and when the first and last of them did.

local function spend_in_log(key, id)
  local log = redis.call('GET', key) or ''
  local first, last = 1, #log - RECORD + 1
  while first <= last and counted_at(log, first) <= ended do
    first = first + RECORD
  end
  if first <= last and counted_at(log, last) > now then
    log = until_now(log, first, last)
    first, last = 1, #log - RECORD + 1
    redis.call('SET', key, log, 'PX', 2 * window)
  end
  local used = (last - first) / RECORD + 1
  local oldest, newest = now, now
  if used > 0 then
    oldest, newest = counted_at(log, first), counted_at(log, last)
  end
  if has(log, id, first) then
    return true, used, oldest, newest
  elseif used >= limit then
    return false, used, oldest, newest
  end
  local record = id .. struct.pack('>I6', now)
  if used > 0 and first == 1 then
    redis.call('APPEND', key, record)
  else
    -- For two windows: what is appended comes within the first of them, since after that this very
    -- record has ended, and the log is written anew.
    redis.call('SET', key, string.sub(log, first) .. record, 'PX', 2 * window)
  end
  return true, used + 1, oldest, now
end

local function end_of_set(key, place)
  return tonumber(redis.call('ZRANGE', key, place, place, 'WITHSCORES')[2])
end

local function spend_in_set(key, id)
  local oldest = end_of_set(key, 0)
  if oldest and oldest <= ended then
    redis.call('ZREMRANGEBYSCORE', key, '-inf', string.format('%.0f', ended))
    oldest = end_of_set(key, 0)
  end
  local used = redis.call('ZCARD', key)
  if used >= limit then
    return redis.call('ZSCORE', key, id), used, oldest, end_of_set(key, -1)
  elseif redis.call('ZADD', key, 'NX', string.format('%.0f', now), id) == 0 then
    return true, used, oldest, end_of_set(key, -1)
  end
  redis.call('PEXPIRE', key, window)
  return true, used + 1, oldest or now, now
end

local spend = limit <= LOG_MAX and spend_in_log or spend_in_set
for place = 2, #KEYS do
  local allowed, used, oldest, newest = spend(KEYS[place], ARGV[place + 2])
  local at = #answer
  answer[at + 1] = allowed and 1 or 0
  answer[at + 2] = math.max(0, limit - used)
  answer[at + 3] = newest + window - now
  answer[at + 4] = used < limit and 0 or oldest + window - now
end
return answer
