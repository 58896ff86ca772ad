-- Operations that are recorded already. $1 user ids, $2 operation ids.
-- LATERAL with LIMIT is a look-up by key for each pair, in its partition only.
SELECT user_id, op_id, found.delta, found.score
FROM unnest($1::varchar[], $2::varchar[]) AS given (user_id, op_id)
CROSS JOIN LATERAL (
    SELECT delta, score FROM score_ops AS kept
    WHERE kept.user_id = given.user_id AND kept.op_id = given.op_id
    LIMIT 1
) AS found
