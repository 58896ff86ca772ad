-- The best of this shard, in the board's order. $1 how many.
SELECT user_id, score, (extract(epoch FROM last_updated) * 1000000)::bigint AS reached_us
FROM user_scores
WHERE score > 0
ORDER BY score DESC, last_updated, user_id COLLATE "C"
LIMIT $1
