-- What users have spent of the quota. $1 user ids, $2 window in seconds.
-- A row for each who has spent any. LATERAL looks up each user in the own partition only.
SELECT user_id, count(*), max(age.seconds) AS oldest_s, min(age.seconds) AS newest_s
FROM unnest($1::varchar[]) AS given (user_id)
CROSS JOIN LATERAL (
    SELECT extract(epoch FROM clock_timestamp()::timestamp - created_at)::float8 AS seconds
    FROM score_ops AS kept
    WHERE kept.user_id = given.user_id
) AS age
WHERE age.seconds < $2
GROUP BY user_id
