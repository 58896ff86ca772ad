-- How many seconds ago users' newest operations were written. $1 user ids, $2 window in seconds, $3 how
-- many of each user at most. A row for each who has any.
SELECT user_id, array_agg(seconds) AS ages_s
FROM unnest($1::varchar[]) AS given (user_id)
CROSS JOIN LATERAL (
    SELECT extract(epoch FROM clock_timestamp()::timestamp - created_at)::float8 AS seconds
    FROM score_ops AS kept
    WHERE kept.user_id = given.user_id
      AND created_at > clock_timestamp()::timestamp - make_interval(secs => $2)
    ORDER BY created_at DESC
    LIMIT $3
) AS age
GROUP BY user_id
