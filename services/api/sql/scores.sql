-- The scores of some users; those of other shards are not found. $1 user ids.
SELECT user_id, score, (extract(epoch FROM last_updated) * 1000000)::bigint AS reached_us
FROM user_scores
WHERE user_id = ANY ($1::varchar[])
