-- What a user has spent of the quota. $1 user id, $2 window in seconds.
WITH age AS (
    SELECT extract(epoch FROM clock_timestamp()::timestamp - created_at)::float8 AS seconds
    FROM score_ops
    WHERE user_id = $1
)
SELECT count(*), coalesce(max(seconds), 0) AS oldest_s, coalesce(min(seconds), 0) AS newest_s
FROM age
WHERE seconds < $2
