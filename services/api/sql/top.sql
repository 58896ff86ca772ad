-- The best of this shard, in the board's order.
-- {size} is no parameter: with an unknown limit PostgreSQL would plan to sort everybody.
SELECT user_id, score, (extract(epoch FROM last_updated) * 1000000)::bigint AS reached_us
FROM user_scores
WHERE score > 0
ORDER BY score DESC, last_updated, user_id COLLATE "C"
LIMIT {size}
