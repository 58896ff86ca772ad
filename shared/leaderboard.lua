-- The top 10: takes scores in any order and any number of times, and announces the board when it
-- changed. Exact because scores only grow, so that a user who fell off the end can come back only
-- with a new score (a join-semilattice: ZADD GT with the time of reaching beside it).
--
-- One script, because Redis runs one at a time: boards are published in the order of their
-- versions, and no reader sees a trimmed set beside an untrimmed board.
--
-- KEYS[1] sorted set: user id -> score           KEYS[2] hash: user id -> reached, microseconds
-- KEYS[3] hash: epoch, version, floor, floor_reached, message   (all three share a hash tag)
--         and shown_epoch, shown_version, where a gateway found that it had shown a newer board
-- ARGV[1] channel        ARGV[2] rows on the board
-- ARGV[3] ARGV[4] the newest epoch and version the caller has seen; 0 0 for none
-- ARGV[5] '1' when the scores that follow hold the true top, so that a board may start from them
-- ARGV[6] how many retractions follow: pairs of user id, score that PostgreSQL does not confirm
-- then    triples of user id, score, reached
--
-- Returns {epoch, version, floor, floor_reached}, or nil when the board is missing, or older than the caller has
-- seen (Redis lost writes), and the scores given are not the whole top: rebuild it.

local scores, reached, board = KEYS[1], KEYS[2], KEYS[3]
local channel, size = ARGV[1], tonumber(ARGV[2])
local seen_epoch, seen_version = tonumber(ARGV[3]), tonumber(ARGV[4])

local function whole(text)
  local number = tonumber(text)
  return number and number >= 0 and number < 2 ^ 53 and number == math.floor(number) and number
end

-- What a gateway has shown was seen, even if no replica that remembers it is left.
local shown = redis.call('HMGET', board, 'shown_epoch', 'shown_version')
local shown_epoch, shown_version = whole(shown[1]) or 0, whole(shown[2]) or 0
if shown_epoch > seen_epoch or (shown_epoch == seen_epoch and shown_version > seen_version) then
  seen_epoch, seen_version = shown_epoch, shown_version
end

local held = redis.call('HMGET', board, 'epoch', 'version', 'floor', 'floor_reached', 'message')
local epoch, version = whole(held[1]), whole(held[2])

local lost = not epoch or not version or epoch < seen_epoch
  or (epoch == seen_epoch and version < seen_version)
if lost then
  if ARGV[5] ~= '1' then return nil end
  local time = redis.call('TIME')
  epoch = math.max(time[1] * 1000000 + time[2], seen_epoch + 1)
  version = 0
end

local at = 7
for _ = 1, tonumber(ARGV[6]) do
  local user, wrong = ARGV[at], tonumber(ARGV[at + 1])
  if tonumber(redis.call('ZSCORE', scores, user) or nil) == wrong then
    redis.call('ZREM', scores, user)
    redis.call('HDEL', reached, user)
  end
  at = at + 2
end

while ARGV[at] do
  local user, score = ARGV[at], tonumber(ARGV[at + 1])
  local before = redis.call('ZSCORE', scores, user)
  if not before or score >= tonumber(before) then
    redis.call('ZADD', scores, score, user)
    redis.call('HSET', reached, user, ARGV[at + 2])
  end
  at = at + 3
end

-- Redis returns equal scores in descending order of the id's bytes. Lua's own comparison of
-- strings follows the server's locale, so the place in this list decides the last tie instead.
local rows = {}
local listed = redis.call('ZRANGE', scores, 0, -1, 'REV', 'WITHSCORES')
for i = 1, #listed, 2 do
  local since = tonumber(redis.call('HGET', reached, listed[i]) or nil) or 2 ^ 53
  rows[#rows + 1] = {user = listed[i], score = tonumber(listed[i + 1]), since = since, place = i}
end
table.sort(rows, function(a, b)
  if a.score ~= b.score then return a.score > b.score end
  if a.since ~= b.since then return a.since < b.since end
  return a.place > b.place
end)
for i = #rows, size + 1, -1 do
  redis.call('ZREM', scores, rows[i].user)
  redis.call('HDEL', reached, rows[i].user)
  rows[i] = nil
end

-- Numbers by format, because cjson rounds to 14 digits.
local lines = {}
for rank, row in ipairs(rows) do
  local user = cjson.encode(row.user):gsub('\\/', '/')
  lines[rank] = string.format('{"userId":%s,"score":%.0f,"rank":%d}', user, row.score, rank)
end
local top = '[' .. table.concat(lines, ',') .. ']'
local function message()
  return string.format('{"epoch":%.0f,"version":%.0f,"topScores":%s}', epoch, version, top)
end

-- What does not come before the last row changes nothing here; that row never falls while scores
-- only grow.
local last = rows[size] or {score = 0, since = 0}
local floor, since = string.format('%.0f', last.score), string.format('%.0f', last.since)
if lost or held[3] ~= floor or held[4] ~= since or held[5] ~= message() then
  version = version + 1
  redis.call('HSET', board, 'epoch', string.format('%.0f', epoch),
    'version', string.format('%.0f', version), 'floor', floor, 'floor_reached', since,
    'message', message())
  redis.call('PUBLISH', channel, message())
end
return {string.format('%.0f', epoch), string.format('%.0f', version), floor, since}
