-- A gateway's share of all connections, counted by user and by address. Each gateway has a hash of
-- its own, which expires: what a killed gateway held comes back by itself.
--
-- KEYS[1] sorted set: gateway -> when its lease ends, milliseconds
-- KEYS[2] hash of this gateway: name -> connections; '' -> how often it was written
--         (all of them share a hash tag; those of the others differ in the gateway's id at the end)
-- ARGV[1] this gateway's id    ARGV[2] the lease, milliseconds
-- ARGV[3] what '' holds as far as the gateway knows; '0' to begin afresh
-- ARGV[4] '1' to refuse what would exceed a limit, '0' to count what is there anyhow
-- then    triples of name, connections, limit
--
-- Returns {writes, granted, …}: as many of the connections as may be, for each name; or nil if the
-- hash is not as the gateway left it (Redis lost it): begin afresh.

local gateways, own = KEYS[1], KEYS[2]
local id, lease = ARGV[1], tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

if ARGV[3] == '0' then
  redis.call('DEL', own)
elseif redis.call('HGET', own, '') ~= ARGV[3] then
  return nil
end
redis.call('ZREMRANGEBYSCORE', gateways, '-inf', now)
redis.call('ZADD', gateways, now + lease, id)
redis.call('PEXPIRE', gateways, lease)

local names = {}
for at = 5, #ARGV, 3 do names[#names + 1] = ARGV[at] end

local elsewhere = {}
local prefix = string.sub(own, 1, #own - #id)
if names[1] then
  for _, other in ipairs(redis.call('ZRANGE', gateways, 0, -1)) do
    if other ~= id then
      local counts = redis.call('HMGET', prefix .. other, unpack(names))
      for i = 1, #names do elsewhere[i] = (elsewhere[i] or 0) + (tonumber(counts[i]) or 0) end
    end
  end
end

local held = names[1] and redis.call('HMGET', own, unpack(names))
local answer = {redis.call('HINCRBY', own, '', 1)}
redis.call('PEXPIRE', own, lease)
for i, name in ipairs(names) do
  local wanted, limit = tonumber(ARGV[3 * i + 3]), tonumber(ARGV[3 * i + 4])
  local granted = wanted
  if ARGV[4] == '1' then
    -- What it holds it keeps, also where others have come meanwhile.
    local most = math.max(limit - (elsewhere[i] or 0), tonumber(held[i]) or 0)
    granted = math.min(wanted, most)
  end
  if granted > 0 then
    redis.call('HSET', own, name, granted)
  else
    redis.call('HDEL', own, name)
  end
  answer[i + 1] = granted
end
return answer
